"""Child processes that are told what to do over a pipe, and whose CPU time is read from outside."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

READY = "ready"
ANSWER_TIMEOUT_S = 60.0

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Address:
    """Where the server of a run is, and under which topic its processes meet."""

    host: str
    port: int
    topic: str


class Failed(Exception):
    """A child process ended, or did not answer in time."""


def preload(*modules: str) -> None:
    """Import these once, in the process that every child is forked from."""
    _context.set_forkserver_preload(list(modules))


class Child:
    """One process running ``main(pipe, *args)``; ``start`` returns when it says that it is ready."""

    def __init__(self, main: Callable[..., None], *args: Any) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=main, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()
        self._clock = 0
        self._is_stopping = False

    def wait_ready(self) -> None:
        if self._receive() != READY:
            raise Failed("a child process did not start as expected")
        # Linux: the CPU clock of another process, in nanoseconds (clock_getcpuclockid(3)).
        assert self._process.pid is not None
        self._clock = (~self._process.pid << 3) | 2

    def tell(self, what: str, **params: Any) -> None:
        self._pipe.send((what, params))

    def answer(self) -> Any:
        return self._receive()

    def ask(self, what: str, **params: Any) -> Any:
        self.tell(what, **params)
        return self.answer()

    @property
    def cpu_s(self) -> float:
        """CPU time of all its threads so far, those that ended included."""
        return time.clock_gettime(self._clock)

    def begin_stop(self) -> None:
        """So that many stop at the same time; ``stop`` waits for the end."""
        if not self._is_stopping:
            self._is_stopping = True
            try:
                self.tell("stop")
            except OSError:
                pass  # it has ended already

    def stop(self) -> None:
        self.begin_stop()
        self._process.join(15)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _receive(self) -> Any:
        if not self._pipe.poll(ANSWER_TIMEOUT_S):
            raise Failed(f"a child process did not answer within {ANSWER_TIMEOUT_S:g} s")
        try:
            return self._pipe.recv()
        except EOFError as exc:
            raise Failed("a child process ended; what it wrote above says why") from exc


async def serve(pipe: Pipe, operations: Mapping[str, Callable[..., Awaitable[Any]]]) -> None:
    """In a child on asyncio: do what the parent asks until it says stop, or is gone."""
    loop = asyncio.get_running_loop()
    pipe.send(READY)
    while True:
        try:
            what, params = await loop.run_in_executor(None, pipe.recv)
        except EOFError:
            return
        if what == "stop":
            return
        pipe.send(await operations[what](**params))


def serve_blocking(pipe: Pipe, operations: Mapping[str, Callable[..., Any]]) -> None:
    """The same in a child with threads."""
    pipe.send(READY)
    while True:
        try:
            what, params = pipe.recv()
        except EOFError:
            return
        if what == "stop":
            return
        pipe.send(operations[what](**params))
