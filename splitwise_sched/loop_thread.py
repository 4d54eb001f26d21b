"""An event loop in a thread of its own, for callers that are no coroutines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from splitwise_sched.errors import SplitwiseError, StoreUnavailable

logger = logging.getLogger(__name__)

# Called with what says that all is ready, and with what is set when it is to end.
Main = Callable[[Callable[[], None], asyncio.Event], Coroutine[Any, Any, None]]


class LoopThread:
    """Runs ``main`` from ``start`` to ``close``. Not to be started again.

    Attributes:
        loop: None before it is ready, and after its end.
    """

    def __init__(self, name: str, main: Main) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._main = main
        self._end: Callable[[], object] | None = None
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, timeout_s: float) -> None:
        """Returns when ``main`` is ready. Raises what it raised before; the thread has ended then.

        Raises:
            StoreUnavailable: it was not ready in time.
        """
        self._thread.start()
        try:
            self._started.result(timeout_s)
        except concurrent.futures.TimeoutError as exc:
            self.close(1.0)
            raise StoreUnavailable(f"Redis did not answer within {timeout_s:g} s") from exc
        except BaseException:
            self.close(1.0)
            raise

    def close(self, timeout_s: float) -> None:
        """Let ``main`` come to its end, and wait for that. Idempotent."""
        if self._end is not None and self._thread.is_alive():
            try:
                self._end()
            except RuntimeError:
                logger.debug("%s had ended by itself", self._thread.name)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the I/O thread %s did not end within %g s", self._thread.name, timeout_s)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) if hasattr(asyncio, "Runner") else _OldRunner() as runner:
                runner.run(self._run_main())
        except SplitwiseError as exc:
            logger.error("the I/O thread %s ends: %s", self._thread.name, exc)
        except asyncio.CancelledError:
            pass

    async def _run_main(self) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        task = asyncio.current_task()
        assert task is not None
        self._end = lambda: loop.call_soon_threadsafe(task.cancel)

        def ready() -> None:
            self.loop = loop
            self._end = lambda: loop.call_soon_threadsafe(stop.set)
            self._started.set_result(None)

        try:
            await self._main(ready, stop)
        except Exception as exc:
            if self._started.done():
                raise
            self._started.set_exception(exc)
        finally:
            self.loop = None


class _OldRunner:
    """asyncio.Runner for Python 3.10."""

    def __enter__(self) -> _OldRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def run(self, main: Any) -> None:
        asyncio.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed: a third less CPU a command."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
