"""Deployments that tests share as long as none fails: the next test, or a second try, has another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Generic, TypeVar

import pytest

Deployment = TypeVar("Deployment")
FAILED = pytest.StashKey[bool]()


class Shared(Generic[Deployment]):
    """Of a module's fixture, which closes it; ``lend`` is for a fixture of a test."""

    def __init__(self, make: Callable[[], AbstractContextManager[Deployment]]) -> None:
        self._make = make
        self._stack = ExitStack()
        self._made: list[Deployment] = []

    def __enter__(self) -> Shared[Deployment]:
        return self

    def __exit__(self, *exc: object) -> None:
        self._made.clear()
        self._stack.close()

    def lend(self, request: pytest.FixtureRequest) -> Iterator[Deployment]:
        if not self._made:
            self._made.append(self._stack.enter_context(self._make()))
        yield self._made[0]
        # Who knows in what state a test left it that did not come to its end.
        if request.node.stash.get(FAILED, False):
            self.__exit__()
