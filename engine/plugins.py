"""Engines by name: the entry points of the group ``engine.engines``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import metadata
from pathlib import Path

from engine.errors import UnknownEngine
from engine.port import EngineDriver
from engine.settings import EngineSettings
from splitwise_sched.types import Role

GROUP = "engine.engines"


class EnginePlugin(ABC):
    """What an entry point names: a class that is made without arguments, and imports its engine only when it must.

    ``tests/integration/test_engine_conformance.py`` runs on every one that is registered.
    """

    @abstractmethod
    def create(self, settings: EngineSettings, role: Role) -> EngineDriver:
        """Load the model; whoever calls this owns the engine and closes it.

        Raises:
            ConfigError: it cannot work: a setting, the model, or something that is not installed.
        """

    @abstractmethod
    def tiny_model(self, folder: Path) -> str:
        """Make a model for tests in ``folder``; returns what ``--model`` has to be.

        It should have more than 512 positions and 500 tokens, and answer differently when any part of its KV changes.

        Raises:
            ConfigError: what is needed to make one is not installed.
        """

    def tokenizer_dir(self, settings: EngineSettings) -> Path | None:
        """The directory from which a gateway on this machine can read the model's tokenizer, if there is one."""
        path = Path(settings.model)
        return path.resolve() if path.is_dir() else None


def installed_engines() -> list[str]:
    """Names of all that are registered; none is imported."""
    return sorted({entry.name for entry in metadata.entry_points(group=GROUP)})


def load_engine(name: str) -> EnginePlugin:
    """
    Raises:
        UnknownEngine: nothing is registered under this name, or what is cannot be used here.
    """
    for entry in metadata.entry_points(group=GROUP):
        if entry.name != name:
            continue
        try:
            plugin = entry.load()
        except (ImportError, AttributeError) as exc:
            raise UnknownEngine(
                name, installed_engines(), f"its plugin {entry.value} cannot be loaded ({exc})"
            ) from exc
        if not isinstance(plugin, type) or not issubclass(plugin, EnginePlugin):
            raise UnknownEngine(name, installed_engines(), f"its plugin {entry.value} is no EnginePlugin")
        return plugin()
    raise UnknownEngine(name, installed_engines(), "there is no such engine")
