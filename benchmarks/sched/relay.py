"""A relay in front of the server that holds all bytes back for a while: what a distant Redis is like."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType


class SlowRelay:
    """Listens on a port of its own, in a thread of its own, and delays each direction by ``delay_s``."""

    def __init__(self, host: str, port: int, delay_s: float) -> None:
        self.host, self.port = "127.0.0.1", 0
        self._target = (host, port)
        self._delay_s = delay_s
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> SlowRelay:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._join, self.host, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        try:
            await asyncio.gather(self._pass(reader, there_writer), self._pass(there_reader, writer))
        except asyncio.CancelledError:
            # The relay is closed; a task of start_server that ends as cancelled would be reported as an error.
            there_writer.close()
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await reader.read(1 << 16):
                loop.call_later(self._delay_s, writer.write, data)
        except ConnectionError:
            pass  # one side is gone: so is the other
        finally:
            loop.call_later(self._delay_s, writer.close)
