"""Three times as many requests as instances can serve: how deep the queue gets, who is refused, who is served in time.

Instances sleep for a known time, so that what they can serve is known; one process holds them, this one the front end.
A request is refused at once, with reason, depth and when to try again, or it is accepted, and then has to end before
its deadline. Once with too few prefill, once with too few decode instances. Afterwards half the capacity is asked for:
how long does it take until a request is as fast as before?
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import uvloop

from benchmarks.common import Report, at_least, at_most, parser, table
from benchmarks.sched import children
from benchmarks.sched.children import Child
from benchmarks.sched.service import Service, run_fleet
from splitwise_sched.embedded.server import EmbeddedServer
from splitwise_sched.errors import QueueFull, RequestFailed
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Request, SamplingParams

OVERLOAD = 3.0
TIMEOUT_S = 3.0
WARM_UP_S, AFTER_S, AFTER_LOAD = 3.0, 10.0, 0.5
# Long enough that what the machine does beside it matters little.
SERVICES = {
    "too few prefill": Service(prefills=8, prefill_s=0.1, decodes=2, slots=80, decode_s=0.7),
    "too few decode": Service(prefills=16, prefill_s=0.1, decodes=2, slots=32, decode_s=0.7),
}
PROMPT = tuple(range(1000, 1064))
DEPTH_PERIOD_S = 0.1


@dataclass
class Phase:
    """What became of the requests of one phase.

    Attributes:
        ended: (s from the phase's begin to the submit, s from there to the last token), of those in time.
        refused: by reason.
    """

    name: str
    seconds: float
    ended: list[tuple[float, float]] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    retry_after_s: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return len(self.ended) + self.missed.total()

    @property
    def goodput(self) -> float:
        return len(self.ended) / self.seconds

    @property
    def in_time(self) -> float:
        return len(self.ended) / max(1, self.accepted)


class Users:
    """They send at a rate, whatever comes back."""

    def __init__(self, frontend: FrontEnd) -> None:
        self._frontend = frontend
        self._count = 0

    async def send(self, phase: Phase, rate: float) -> Phase:
        """Returns when the last of the phase's requests has ended."""
        loop = asyncio.get_running_loop()
        begin, tasks, i = loop.time(), [], 0
        watching = asyncio.create_task(self._watch(phase))
        while i / rate < phase.seconds:
            await asyncio.sleep(begin + i / rate - loop.time())
            tasks.append(asyncio.create_task(self._one(phase, begin)))
            i += 1
        watching.cancel()
        await asyncio.gather(*tasks)
        return phase

    async def _one(self, phase: Phase, begin: float) -> None:
        self._count += 1
        submitted = time.monotonic()
        sampling = SamplingParams(max_tokens=2, temperature=0.0)
        try:
            stream = await self._frontend.submit(
                Request(f"r{self._count}", "none", PROMPT, sampling, timeout_s=TIMEOUT_S)
            )
            async for _ in stream:
                pass
            took = time.monotonic() - submitted
            if took > TIMEOUT_S:
                phase.missed["ended late"] += 1
            else:
                phase.ended.append((submitted - begin, took))
        except QueueFull as exc:
            phase.refused[type(exc).__name__] += 1
            phase.retry_after_s.append(exc.retry_after_s)
        except RequestFailed as exc:
            phase.missed[exc.reason] += 1

    async def _watch(self, phase: Phase) -> None:
        while True:
            store = self._frontend.store
            counters = await store.counters()
            phase.depths.append(await store.queue_depth() + int(counters.get("waiting", 0)))
            await asyncio.sleep(DEPTH_PERIOD_S)


async def measure(settings: SchedulerSettings, service: Service, seconds: float) -> list[Phase]:
    async with FrontEnd(settings) as frontend:
        users = Users(frontend)
        before = await users.send(Phase("before", WARM_UP_S), AFTER_LOAD * service.capacity)
        over = Phase("overload", seconds)
        after = Phase("after", AFTER_S)
        # The next begins when this one's last is sent, not when it ended.
        sending = asyncio.create_task(users.send(over, OVERLOAD * service.capacity))
        await asyncio.sleep(seconds)
        await users.send(after, AFTER_LOAD * service.capacity)
        await sending
    return [before, over, after]


def normal_after_s(before: Phase, after: Phase) -> float:
    """The second of ``after`` from which on nobody was refused or late, and the median time was that of ``before``."""
    usual = 1.5 * median(took for _, took in before.ended)
    normal_from = 0
    for second in range(int(after.seconds)):
        times = [took for at, took in after.ended if second <= at < second + 1]
        if not times or median(times) > usual:
            normal_from = second + 1
    return float(normal_from)


def run(name: str, service: Service, seconds: float, server: EmbeddedServer, report: Report) -> list[list[str]]:
    settings = SchedulerSettings(
        scheduler_host=server.host, scheduler_port=server.port, scheduler_topic=name.replace(" ", "-")
    )
    child = Child(run_fleet, settings, service)
    try:
        child.wait_ready()
        before, over, after = uvloop.run(measure(settings, service, seconds))
    finally:
        child.stop()
    normal_s = normal_after_s(before, after)
    depth_limit = OVERLOAD * service.capacity * TIMEOUT_S
    for phase in (before, over, after):
        facts: dict[str, Any] = {
            "service": name, "phase": phase.name, "capacity_per_s": round(service.capacity, 1),
            "accepted": phase.accepted, "in_time": len(phase.ended), "missed": dict(phase.missed),
            "refused": dict(phase.refused), "max_depth": max(phase.depths, default=0),
            "median_s": round(median(took for _, took in phase.ended), 3) if phase.ended else None,
        }  # fmt: skip
        if phase.retry_after_s:
            facts["retry_after_s"] = [round(x, 2) for x in (min(phase.retry_after_s), max(phase.retry_after_s))]
        report.runs.append(facts)
    report.targets += [
        at_least(f"{name}: accepted requests that met their deadline", over.in_time, 0.99),
        at_least(f"{name}: goodput, part of the capacity", over.goodput / service.capacity, 0.85),
        at_most(f"{name}: deepest queue", max(over.depths), depth_limit),
        at_most(f"{name}: seconds until normal", normal_s, 5),
        at_least(f"{name}: part of what was refused that names when to try again", _with_retry(over), 1),
    ]
    return [
        [f"{name}, {phase.name}", f"{phase.goodput:.1f}", f"{phase.accepted}", f"{100 * phase.in_time:.2f} %",
         f"{phase.refused.total()}", f"{max(phase.depths, default=0)}"]
        for phase in (before, over, after)
    ]  # fmt: skip


def _with_retry(phase: Phase) -> float:
    return sum(seconds > 0 for seconds in phase.retry_after_s) / max(1, phase.refused.total())


def main() -> None:
    args = parser(__doc__).parse_args()
    seconds = 8.0 if args.quick else 60.0
    children.preload("benchmarks.sched.service")
    report = Report("overload", {"times_capacity": OVERLOAD, "seconds": seconds, "timeout_s": TIMEOUT_S})
    rows = []
    with EmbeddedServer() as server:
        report.settings = {**report.settings, "server": server.server_version}
        for name, service in SERVICES.items():
            print(f"{name}: capacity {service.capacity:.0f} requests/s, {service.service_s:.2f} s each", flush=True)
            rows += run(name, service, seconds, server, report)
    print(table(("", "in time/s", "accepted", "of them in time", "refused", "deepest queue"), rows))
    report.finish(args.json)


if __name__ == "__main__":
    main()
