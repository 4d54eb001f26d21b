"""What our side of a step costs engines that we drive, and how much of a transfer their prefill hides."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import Report
from benchmarks.serving.findings import LONG_PROMPT, NUM_LONG, Overlap, report_hooks, report_overlap
from benchmarks.serving.latency import burst, one
from engine.demo.fleet import Fleet
from engine.plugins import load_engine
from engine.port import BlocksReady, EngineDriver, EngineEvent, TokensOut
from engine.runner import Runner, RunnerOptions
from engine.settings import EngineSettings
from kv_transfer.options import TransferOptions
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Role


class Measured(Runner):
    """A runner that counts its thread's CPU time inside the engine's planning and computing, and outside of it."""

    def __init__(self, engine: EngineDriver, settings: SchedulerSettings, role: Role) -> None:
        super().__init__(engine, settings, TransferOptions(), RunnerOptions(name=role.value, role=role))
        self.hook_s: list[float] = []
        self.step_s: list[float] = []
        # By run: (blocks were first ready, first token was there); when the first step after commit began.
        self.offered: dict[str, float] = {}
        self.prefilled: dict[str, float] = {}
        self.decoding: dict[str, float] = {}
        self._committed: list[str] = []
        self._in_engine_s = 0.0
        self._step, self._has_work, self._commit = engine.step, engine.has_work, engine.commit
        engine.step, engine.has_work = self._timed_step, self._timed_has_work  # type: ignore[method-assign]
        engine.commit = self._noted_commit  # type: ignore[method-assign]

    def _timed_has_work(self) -> bool:
        start = time.thread_time()
        try:
            return self._has_work()
        finally:
            self._in_engine_s += time.thread_time() - start

    def _timed_step(self) -> list[EngineEvent]:
        if self._committed:
            self.decoding.update(dict.fromkeys(self._committed, time.monotonic()))
            self._committed.clear()
        start = time.thread_time()
        try:
            events = self._step()
        finally:
            self._in_engine_s += time.thread_time() - start
        if self.role is Role.PREFILL:
            self._note(events)
        return events

    def _note(self, events: list[EngineEvent]) -> None:
        now = time.monotonic()
        for event in events:
            if isinstance(event, BlocksReady):
                self.offered.setdefault(event.key, now)
            else:
                self.prefilled[event.key] = now

    def _noted_commit(self, key: str, first: TokensOut) -> None:
        self._commit(key, first)
        self._committed.append(key)

    def go_round(self) -> bool:
        self._in_engine_s = 0.0
        start = time.thread_time()
        computed = super().go_round()
        if computed:
            self.hook_s.append(time.thread_time() - start - self._in_engine_s)
            self.step_s.append(self._in_engine_s)
        return computed

    def medians_us(self) -> tuple[float, float]:
        """(hooks, step), of what was measured since the last call."""
        found = tuple(1e6 * statistics.median(values or [0.0]) for values in (self.hook_s, self.step_s))
        self.hook_s.clear()
        self.step_s.clear()
        return found[0], found[1]


@contextmanager
def running(
    engine: str, model: Path, fields: Mapping[str, Any], settings: SchedulerSettings
) -> Iterator[tuple[Measured, Measured]]:
    """A prefill and a decode instance in threads of this process."""
    runners = []
    for role in (Role.PREFILL, Role.DECODE):
        chosen = EngineSettings(engine=engine, model=str(model), **fields)
        runners.append(Measured(load_engine(engine).create(chosen, role), settings, role))
        runners[-1].start()
    threads = [threading.Thread(target=runner.run) for runner in runners]
    for thread in threads:
        thread.start()
    try:
        yield runners[0], runners[1]
    finally:
        for runner in runners:
            runner.stop()
        for thread in threads:
            thread.join(30)
        for runner in runners:
            runner.close()
            runner.engine.close()


async def measure(
    engine: str, model: Path, fields: Mapping[str, Any], count: int, report: Report
) -> tuple[list[list[object]], list[list[object]]]:
    """Rows of two tables: median CPU time a step with and without transfers, and transfers of long prompts."""
    with Fleet() as fleet, running(engine, model, fields, fleet.settings) as (prefill, decode):
        async with FrontEnd(fleet.settings) as frontend:
            await burst(frontend, f"hooks-warm-up-{engine}", 4)
            for runner in (prefill, decode):
                runner.medians_us()
            # Prefill stays ahead, so that transfers are under way in most of its steps and of decode's.
            await burst(frontend, f"hooks-{engine}", max(16, count))
            figures = {"prefill, KV moves": prefill.medians_us(), "decode, KV comes in": decode.medians_us()}
            await one(frontend, f"hooks-idle-{engine}", 3, 200)
            figures["decode, idle"] = decode.medians_us()
            for i in range(NUM_LONG):
                await one(frontend, f"long-{engine}-{i}", LONG_PROMPT, 2)
    found = [
        Overlap(begin=prefill.offered[key], prefilled=prefill.prefilled[key], decoding=at)
        for key, at in decode.decoding.items()
        if key.startswith("long-")
    ]
    return report_hooks(engine, figures, report), report_overlap(engine, found, report)
