"""Engines by name: what is not there, or cannot be used, is told by name with the ones that are."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from engine.errors import UnknownEngine
from engine.llama_cpp import library
from engine.plugins import EnginePlugin, installed_engines, load_engine
from splitwise_sched.errors import ConfigError


def register(monkeypatch: pytest.MonkeyPatch, folder: Path, target: str) -> None:
    """An entry point ``odd``, as an installed package would bring it."""
    info = folder / "odd-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[engine.engines]\nodd = {target}\n")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])


def test_engines_of_this_project_are_plugins_and_load_without_their_libraries() -> None:
    for name in ("transformers", "llama_cpp"):
        assert name in installed_engines()
        assert isinstance(load_engine(name), EnginePlugin)


def test_unknown_name_lists_what_is_registered() -> None:
    with pytest.raises(UnknownEngine, match=r"--engine nope: there is no such engine; registered are: .*transformers"):
        load_engine("nope")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:Plugin", "cannot be loaded .*no_such_module"),
        ("json:NoSuchName", "cannot be loaded .*NoSuchName"),
        ("json:loads", "is no EnginePlugin"),
    ],
)
def test_plugin_that_cannot_be_used_says_why(monkeypatch, tmp_path, target, message) -> None:
    register(monkeypatch, tmp_path, target)
    with pytest.raises(UnknownEngine, match=message):
        load_engine("odd")


def test_llama_cpp_without_its_wheel_says_what_to_install(monkeypatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ConfigError, match=rf"needs xllamacpp {library.VERSION}.*'splitwise-sched\[llama-cpp"):
        library.load_library.__wrapped__()


def test_the_wheel_that_the_engine_knows_is_the_one_that_its_extra_brings() -> None:
    setup = (Path(__file__).resolve().parents[2] / "setup.cfg").read_text(encoding="utf-8")
    assert setup.count(f"{library.PACKAGE}=={library.VERSION}") == setup.count(f"{library.PACKAGE}==") == 2
