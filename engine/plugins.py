"""Engines by name: entry points of ``engine.engines``, which we drive, and of ``engine.services``, which drive us."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import metadata
from pathlib import Path

from engine.errors import UnknownEngine
from engine.port import EngineDriver
from engine.settings import EngineSettings, InstanceSettings, TransferSettings
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Role

GROUP = "engine.engines"
SERVICES = "engine.services"


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


class ServicePlugin(ABC):
    """An engine that drives itself, and so brings an instance of its own; made as an EnginePlugin is."""

    @abstractmethod
    def serve(
        self,
        engine: EngineSettings,
        instance: InstanceSettings,
        transfer: TransferSettings,
        scheduler: SchedulerSettings,
    ) -> None:
        """Serve until SIGTERM or Ctrl-C, in the main thread. Raises SplitwiseError and KVTransferError."""


def installed_engines() -> list[str]:
    """Names of all engines that we drive; none is imported."""
    return sorted({entry.name for entry in metadata.entry_points(group=GROUP)})


def load_service(name: str) -> ServicePlugin | None:
    """
    Returns:
        None when no engine that drives itself has this name.
    Raises:
        UnknownEngine: what is registered cannot be used here.
    """
    for entry in metadata.entry_points(group=SERVICES):
        if entry.name == name:
            plugin = entry.load()
            if not isinstance(plugin, type) or not issubclass(plugin, ServicePlugin):
                raise UnknownEngine(name, installed_engines(), f"its plugin {entry.value} is no ServicePlugin")
            return plugin()
    return None


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
