"""The thread that carries one transport: an event loop with descriptors, connections and timers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

_CLOSE_TIMEOUT_S = 5.0


class LoopThread:
    """Owns an asyncio loop and the tasks in it."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None]) -> bool:
        """Run in the loop's thread, in order; from any thread. False when the loop has ended: it will not be run."""
        with self._lock:
            if self._closing:
                return False
            self.loop.call_soon_threadsafe(call)
            return True

    def close(self, finish: Callable[[], None]) -> None:
        """Run ``finish`` in the loop's thread, then end it. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self.loop.call_soon_threadsafe(self._stop, finish)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _stop(self, finish: Callable[[], None]) -> None:
        try:
            finish()
        finally:
            self.loop.stop()

    async def _wind_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_default_executor()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self._wind_up())
        finally:
            with self._lock:
                self._closing = True
            self.loop.close()
