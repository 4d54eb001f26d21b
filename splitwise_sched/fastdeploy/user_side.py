"""The side that puts requests in and gets results out: a front end on an I/O thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from splitwise_sched.errors import RequestFailed, SplitwiseError
from splitwise_sched.fastdeploy.messages import error_dict, result_dict
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.loop_thread import LoopThread
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Request

MAX_UNREAD = 1_000_000
START_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 10.0


class UserSide:
    """Submits requests and keeps their results until they are taken. Its methods may be called from any thread.

    ``start`` begins the I/O thread, ``close`` ends it and cancels what has not ended.
    """

    def __init__(self, settings: SchedulerSettings, nodeid: str) -> None:
        self.nodeid = nodeid
        self._settings = settings
        self._lock = threading.Lock()
        self._results: dict[str, list[dict[str, Any]]] = {}
        self._num_unread = 0
        self._frontend: FrontEnd | None = None
        self._thread: LoopThread | None = None
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.loop is not None

    def start(self) -> None:
        """Raises what FrontEnd.start raises; nothing runs on after that."""
        self._thread = LoopThread("splitwise-frontend", self._main)
        try:
            self._thread.start(START_TIMEOUT_S)
        except BaseException:
            self._thread = None
            raise

    def close(self) -> None:
        """Idempotent."""
        if self._thread is not None:
            self._thread.close(CLOSE_TIMEOUT_S)
            self._thread = None

    def submit(self, requests: Sequence[tuple[str, Request]]) -> list[str | None]:
        """Submit all of them at a time, and wait for Redis to say what became of each.

        Args:
            requests: their user's id, and the request.

        Returns:
            [num_requests] None for each that is queued, else why it is not.
        """
        loop = self._thread.loop if self._thread is not None else None
        if loop is None:
            return ["the scheduler was not started: call start(role, host, disaggregated) first"] * len(requests)
        with self._lock:
            if self._num_unread >= MAX_UNREAD:
                return [f"{MAX_UNREAD} results were not read: call get_results()"] * len(requests)
        deadline_s = self._settings.redis_timeout_s + 5
        submitted = asyncio.run_coroutine_threadsafe(self._submit(requests), loop)
        try:
            return submitted.result(deadline_s)
        except concurrent.futures.TimeoutError:
            submitted.cancel()
            return [f"Redis did not take it within {deadline_s:g} s"] * len(requests)
        except concurrent.futures.CancelledError:
            return ["the scheduler was stopped"] * len(requests)

    def take(self, user_ids: Collection[str] = ()) -> dict[str, list[dict[str, Any]]]:
        """What came since the last call, in order, for the requests named, or for all when none is."""
        with self._lock:
            if user_ids:
                taken = {i: self._results.pop(i) for i in user_ids if i in self._results}
            else:
                taken, self._results = self._results, {}
            self._num_unread -= sum(map(len, taken.values()))
        return taken

    # ---- the I/O thread ------------------------------------------------------------------------------------------

    async def _main(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        self._frontend = FrontEnd(self._settings, name=self.nodeid)
        await self._frontend.start()
        ready()
        try:
            await stop.wait()
        finally:
            # Every stream ends with that, and so does whoever reads it.
            await self._frontend.close()
            if self._pumps:
                await asyncio.wait(self._pumps, timeout=1)

    async def _submit(self, requests: Sequence[tuple[str, Request]]) -> list[str | None]:
        return list(await asyncio.gather(*(self._submit_one(user_id, request) for user_id, request in requests)))

    async def _submit_one(self, user_id: str, request: Request) -> str | None:
        assert self._frontend is not None
        try:
            stream = await self._frontend.submit(request)
        except SplitwiseError as exc:
            return str(exc)
        pump = asyncio.create_task(self._pump(user_id, stream))
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)
        return None

    async def _pump(self, user_id: str, stream: OutputStream) -> None:
        try:
            async for output in stream:
                self._give(user_id, result_dict(user_id, output))
        except RequestFailed as exc:
            message = f"request {user_id} {exc.reason}: {exc.detail}"
            self._give(user_id, error_dict(user_id, message, exc.extra))

    def _give(self, user_id: str, result: dict[str, Any]) -> None:
        with self._lock:
            self._results.setdefault(user_id, []).append(result)
            self._num_unread += 1
