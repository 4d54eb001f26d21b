"""One request as its front end keeps it, and as its user reads it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from splitwise_sched.assembly import Assembly
from splitwise_sched.errors import RequestFailed, SplitwiseError
from splitwise_sched.types import FinishReason, Output, Request

BAD_ENDS = {FinishReason.ERROR: "failed", FinishReason.EXPIRED: "expired"}
Cancel = Callable[[str, str], Awaitable[bool]]


class OutputStream(AsyncIterator[Output]):
    """Outputs of one request: in order, no token twice; the last has a ``finish_reason``.

    Raises RequestFailed, once, when the request ended without its answer. ``aclose`` cancels what has not ended.

    Attributes:
        nonce: of the submit, by which Redis knows a repetition of it.
        deadline: monotonic, s.
        shard: index of the shard that it is in.
        attempts: times that it was put back.
        num_replicas: that had the request when it counted as submitted; None where nobody waited for that.
        gap_at: position at which tokens were missing when that was last looked at.
        doubts: times in a row that Redis said it had ended, with its last output still missing.
        doubted_at: monotonic, s: the first of them.
    """

    def __init__(self, request: Request, nonce: str, deadline: float, cancel: Cancel) -> None:
        self.request_id = request.request_id
        self.request = request
        self.nonce = nonce
        self.deadline = deadline
        self.submitted_at = time.monotonic()
        self.assembly = Assembly(token_ids=request.emitted_token_ids)
        self.shard = 0
        self.attempts = 0
        self.num_replicas: int | None = None
        self.doubts = 0
        self.doubted_at = 0.0
        self.gap_at: int | None = None
        self.recovery: asyncio.Task[None] | None = None
        self._cancel = cancel
        self._outputs: deque[Output | SplitwiseError] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._over = False

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> Output:
        if self._over:
            raise StopAsyncIteration
        while not self._outputs:
            assert self._arrival is None, "one task at a time reads an OutputStream"
            self._arrival = asyncio.get_running_loop().create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None
        item = self._outputs.popleft()
        if isinstance(item, SplitwiseError):
            self._over = True
            raise item
        if item.finish_reason is not None:
            self._over = True
            if item.finish_reason in BAD_ENDS:
                reason = BAD_ENDS[item.finish_reason]
                raise RequestFailed(self.request_id, reason, item.detail or "no reason was given", extra=item.extra)
        return item

    async def aclose(self) -> None:
        """Cancel the request when it has not ended; nothing more comes out. Idempotent."""
        if not self._over:
            self._over = True
            if not self.assembly.ended:
                await self._cancel(self.request_id, "its user went away")

    def put(self, item: Output | SplitwiseError) -> None:
        """For the front end's reader."""
        self._outputs.append(item)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
