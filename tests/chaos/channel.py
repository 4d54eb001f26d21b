"""What a process of a run tells the harness, and is told by it: lists as lines of JSON over a unix socket.

A line is in the kernel before ``tell`` returns unless the harness lags, so that what a process said survives it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

MAX_LINE = 1 << 20
Handler = Callable[[list[Any]], None]


class Channel:
    """A process's end. When the harness is gone, the process is too."""

    def __init__(self, writer: asyncio.StreamWriter, reading: asyncio.Task[None]) -> None:
        self._writer = writer
        self._reading = reading

    @classmethod
    async def open(cls, path: str, name: str, on_command: Handler) -> Channel:
        reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE)

        async def read() -> None:
            while line := await reader.readline():
                on_command(json.loads(line))
            os._exit(3)

        channel = cls(writer, asyncio.create_task(read()))
        channel.tell("hello", name, os.getpid())
        return channel

    def tell(self, *event: Any) -> None:
        self._writer.write(json.dumps(event).encode() + b"\n")

    async def flush(self) -> None:
        await self._writer.drain()


class Hub:
    """The harness's end: accepts processes, and hands on what they say as ``on_event(name, event)``."""

    def __init__(self, path: str, on_event: Callable[[str, list[Any]], None], on_gone: Callable[[str, int], None]):
        self.path = path
        self._on_event, self._on_gone = on_event, on_gone
        self._writers: dict[tuple[str, int], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._join, self.path, limit=MAX_LINE)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers.values():
            writer.close()

    def knows(self, name: str, pid: int) -> bool:
        """Whether that process is connected; then ``on_gone`` tells of its end."""
        return (name, pid) in self._writers

    def command(self, name: str, pid: int, *command: Any) -> None:
        """Nothing happens when that process is gone."""
        writer = self._writers.get((name, pid))
        if writer is not None:
            writer.write(json.dumps(command).encode() + b"\n")

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        who: tuple[str, int] | None = None
        try:
            while line := await reader.readline():
                event = json.loads(line)
                if event[0] == "hello":
                    who = (event[1], event[2])
                    self._writers[who] = writer
                elif who is not None:
                    self._on_event(who[0], event)
        except (ConnectionError, ValueError):
            pass  # cut off in the middle of a line: it was killed
        finally:
            writer.close()
            if who is not None:
                self._writers.pop(who, None)
                self._on_gone(*who)
