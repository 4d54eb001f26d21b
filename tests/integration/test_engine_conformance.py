"""Every registered engine plugin passes the conformance suite: whoever adds one has it run unasked."""

from __future__ import annotations

from engine.conformance import EngineConformance
from engine.plugins import installed_engines, load_engine


def suite_of(name: str) -> type:
    return type(f"Test_{name}", (EngineConformance,), {"plugin": load_engine(name)})


globals().update({f"Test_{name}": suite_of(name) for name in installed_engines()})


def test_the_suite_runs_on_the_engines_of_this_project() -> None:
    assert {"transformers"} <= set(installed_engines())
