"""Forks the processes of a run from one that has imported everything, so that a replacement starts in milliseconds.

Told over stdin, a line of JSON a process; tells over stdout, as lines of JSON: ["forked", pid] for each in order, and
["exit", pid, status] when one has ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Zygote:
    """The harness's side. Args: on_exit: called with pid and status of a process that has ended."""

    def __init__(self, on_exit: Callable[[int, int], None]) -> None:
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._forking: deque[tuple[Callable[[int], Any], asyncio.Future[Any]]] = deque()

    async def start(self, root: str) -> None:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.chaos.zygote", cwd=root, stdin=pipe, stdout=pipe
        )
        self._reading = asyncio.create_task(self._read())

    async def fork(self, text: str, on_forked: Callable[[int], T]) -> T:
        """A new process that runs children.main.begin(text); ``on_forked`` gets its pid before anything else is heard
        of it, and gives the result."""
        assert self._process is not None and self._process.stdin is not None
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._forking.append((on_forked, future))
        self._process.stdin.write(json.dumps(text).encode() + b"\n")
        return await future

    async def close(self) -> None:
        """What was forked is killed by whoever knows the pids, before this."""
        if self._process is not None and self._reading is not None:
            self._process.stdin.close()  # type: ignore[union-attr]
            await self._process.wait()
            await self._reading

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            event: list[Any] = json.loads(line)
            if event[0] == "forked":
                on_forked, future = self._forking.popleft()
                future.set_result(on_forked(event[1]))
            else:
                self._on_exit(event[1], event[2])


def _say(*event: Any) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


def _bury(*_: object) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say("exit", pid, os.waitstatus_to_exitcode(status))


def main() -> None:
    from tests.chaos.children.main import begin

    signal.signal(signal.SIGCHLD, _bury)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in iter(sys.stdin.readline, ""):
        # Its end must not be told before its beginning.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            status = 1
            try:
                begin(json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _say("forked", pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


if __name__ == "__main__":
    main()
