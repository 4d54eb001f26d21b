"""Commands that are issued close together ride in one pipeline.

The Python client costs ten times what the server does, most of it per round trip; while one pipeline is under way, the
commands that come in the meantime gather for the next one. Order is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

MAX_PIPELINE = 512


@dataclass(frozen=True, slots=True)
class Command:
    """One Redis command.

    Attributes:
        script: for EVALSHA the script's name, so that it can be loaded when the server does not know it.
        binary: the reply holds bytes that are no text.
    """

    args: tuple[Any, ...]
    script: str | None = None
    binary: bool = False


class Coalescer:
    """Sends commands in the order of ``call``, in pipelines of those that wait.

    Args:
        send: runs a batch; returns one reply a command, where an exception instance is that command's failure.
            When it raises, all commands of the batch fail with that.
    """

    def __init__(self, send: Callable[[list[Command]], Awaitable[list[Any]]]) -> None:
        self._send = send
        self._waiting: list[tuple[Command, asyncio.Future[Any]]] = []
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def call(self, command: Command) -> asyncio.Future[Any]:
        """Must be called from the event loop's thread."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.cancel()
            return future
        self._waiting.append((command, future))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        return future

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_PIPELINE], self._waiting[MAX_PIPELINE:]
                try:
                    replies = await self._send([command for command, _ in batch])
                except asyncio.CancelledError:
                    for _, future in batch:
                        future.cancel()
                    raise
                except Exception as exc:
                    replies = [exc] * len(batch)
                for (_, future), reply in zip(batch, replies, strict=True):
                    if future.done():
                        continue
                    if isinstance(reply, Exception):
                        future.set_exception(reply)
                        # A caller that does not wait for the reply is no reason for a warning at exit.
                        future.exception()
                    else:
                        future.set_result(reply)
        finally:
            self._task = None

    async def drain(self) -> None:
        """Wait until everything that was issued has its reply."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Cancel what has not been answered."""
        self._closed = True
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
