"""A front end and its users, who come at a fixed rate whatever happens, and tell how each request went."""

from __future__ import annotations

import asyncio
import time

from splitwise_sched.errors import RequestFailed, SplitwiseError
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import FinishReason
from tests.chaos.channel import Channel
from tests.chaos.children.common import start, tell_stats
from tests.chaos.spec import ChildSpec
from tests.chaos.workload import ask_of

MAX_OPEN = 4000
LONG_GAP_S = 0.25
FIRST_TICK_S = 0.005


class Users:
    def __init__(self, frontend: FrontEnd, channel: Channel, prefix: str, timeout_s: float) -> None:
        self._frontend, self._channel = frontend, channel
        self._prefix, self._timeout_s = prefix, timeout_s
        self.tasks: set[asyncio.Task[None]] = set()
        self._coming: asyncio.Task[None] | None = None
        self._num = 0

    def come(self, rate: float) -> None:
        """So many a second from now on; 0: nobody more."""
        if self._coming is not None:
            self._coming.cancel()
        self._coming = asyncio.create_task(self._come(rate)) if rate else None

    async def _come(self, rate: float) -> None:
        due = time.monotonic()
        while True:
            due = max(due + 1 / rate, time.monotonic() - 1.0)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(self.tasks) < MAX_OPEN:
                self._num += 1
                task = asyncio.create_task(self._use(f"{self._prefix}-{self._num}"))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    async def _use(self, request_id: str) -> None:
        ask = ask_of(request_id)
        tokens: list[int] = []
        gaps: list[tuple[float, float]] = []
        outcome, detail, last = "no end", "", time.monotonic()
        self._channel.tell("submitting", request_id)
        try:
            stream = await self._frontend.submit(ask.to_request(self._timeout_s))
            last = time.monotonic()
            async for output in stream:
                now = time.monotonic()
                if now - last > LONG_GAP_S:
                    gaps.append((last, now))
                last = now
                if output.index != len(tokens):
                    detail += f"an output begins at {output.index}, after {len(tokens)} tokens; "
                tokens += output.token_ids
                if outcome == "complete":
                    detail += "something came after the end; "
                if output.finish_reason is FinishReason.LENGTH:
                    outcome = "complete"
                elif output.finish_reason is not None:
                    outcome, detail = output.finish_reason.value, detail + (output.detail or "")
                elif ask.cancel_after is not None and len(tokens) >= ask.cancel_after:
                    outcome = "cancelled"
                    await stream.aclose()
        except RequestFailed as exc:
            outcome, detail = exc.reason, detail + exc.detail
        except SplitwiseError as exc:
            outcome = outcome if outcome == "cancelled" else "refused"
            detail += f"{type(exc).__name__}: {exc}"
        self._channel.tell("end", request_id, outcome, tokens, gaps, detail)


async def run(spec: ChildSpec, settings: SchedulerSettings, channel: Channel, commands: asyncio.Queue[list]) -> None:
    async def attempt() -> FrontEnd:
        frontend = FrontEnd(settings, name=spec.name)
        await frontend.start()
        return frontend

    frontend = await start(attempt)
    users = Users(frontend, channel, f"{spec.name}.{spec.generation}", spec.timeout_s)
    stats = asyncio.create_task(tell_stats(channel, lambda: len(users.tasks)))
    channel.tell("ready")
    while True:
        command, *args = await commands.get()
        if command == "rate":
            users.come(*args)
        elif command == "close":
            break
    users.come(0)
    await frontend.close()
    if users.tasks:
        await asyncio.wait(users.tasks)
    stats.cancel()
    channel.tell("closed")
    await channel.flush()
