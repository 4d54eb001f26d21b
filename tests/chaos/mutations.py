"""Bugs to plant in the processes of a run: each one that the harness would miss is a hole in the harness."""

from __future__ import annotations

from collections.abc import Callable

MUTATIONS: dict[str, Callable[[], None]] = {}


def plant(name: str) -> None:
    MUTATIONS[name]()
