"""What disaggregation costs and gains on each engine of this project, beside the same engine doing both.

Two instances of one thread each, first as prefill and decode, then the same two processes as mixed ones: TTFT and TPOT
at a quarter, half and four fifths of what the mixed ones get through. And what our hooks cost a step, in µs of the
loop's own thread, at idle (decode alone) and while KV moves.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import Report, at_most, parser, table
from engine.demo.fleet import Fleet, free_port
from engine.llama_cpp.testing import make_tiny_gguf
from engine.plugins import load_engine
from engine.port import EngineDriver, EngineEvent
from engine.runner import Runner, RunnerOptions
from engine.settings import EngineSettings
from engine.testing import make_tiny_model
from kv_transfer.options import TransferOptions
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Request, Role, SamplingParams

ENGINES = ("transformers", "llama_cpp")
LOADS = (0.25, 0.5, 0.8)
FIELDS: dict[str, Any] = {
    "dtype": "float32",
    "served_model_name": "bench",
    "num_gpu_blocks_override": 512,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "num_threads": 1,
}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
PROMPT_TOKENS = (32, 256)
NUM_OUTPUT = 24
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Timing:
    """Of one request, in ms: to its first token, and from token to token after it."""

    ttft_ms: float
    tpot_ms: float


def requests_of(name: str, count: int) -> list[Request]:
    rng = random.Random(name)
    sampling = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True)
    lengths = [rng.randint(*PROMPT_TOKENS) for _ in range(count)]
    return [
        Request(f"{name}-{i}", "bench", tuple(rng.randrange(3, 1000) for _ in range(n)), sampling)
        for i, n in enumerate(lengths)
    ]


async def timed(frontend: FrontEnd, request: Request, delay_s: float) -> Timing:
    await asyncio.sleep(delay_s)
    start = time.perf_counter()
    first = last = start
    num_tokens = 0
    async for output in await frontend.submit(request):
        last = time.perf_counter()
        if num_tokens == 0:
            first = last
        num_tokens += len(output.token_ids)
    if num_tokens != NUM_OUTPUT:
        raise SystemExit(f"{request.request_id} got {num_tokens} tokens of {NUM_OUTPUT}")
    return Timing(1000 * (first - start), 1000 * (last - first) / (num_tokens - 1))


async def burst(frontend: FrontEnd, name: str, count: int) -> float:
    """Requests a second, when all come at once."""
    start = time.perf_counter()
    await asyncio.gather(*(timed(frontend, request, 0.0) for request in requests_of(name, count)))
    return count / (time.perf_counter() - start)


async def poisson(frontend: FrontEnd, name: str, count: int, rate: float) -> list[Timing]:
    rng, at, delays = random.Random(name), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        delays.append(at)
    pairs = zip(requests_of(name, count), delays, strict=True)
    return list(await asyncio.gather(*(timed(frontend, request, delay) for request, delay in pairs)))


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


async def become(fleet: Fleet, frontend: FrontEnd, roles: dict[int, str]) -> None:
    """Change the roles of instances by their HTTP ports, and wait until Redis has them."""
    async with httpx.AsyncClient() as client:
        for port, role in roles.items():
            (await client.post(f"http://127.0.0.1:{port}/role", content=role, timeout=30)).raise_for_status()
    deadline = time.monotonic() + 60
    while sorted(r.role.value for r in await frontend.instances()) != sorted(roles.values()):
        fleet.check()
        if time.monotonic() > deadline:
            raise SystemExit("the instances did not change their roles within 60 s")
        await asyncio.sleep(0.1)


async def compare(engine: str, model: Path, count: int, report: Report) -> list[list[object]]:
    """Rows of the table, for one engine."""
    flags = [f for name, value in FIELDS.items() for f in (f"--{name.replace('_', '-')}", str(value))]
    timings: dict[tuple[str, float], list[Timing]] = {}
    ports = {free_port(): "mixed" for _ in range(2)}
    with Fleet() as fleet:
        for index, port in enumerate(ports):
            arguments = ("--engine", engine, "--model", str(model), "--port", str(port), *flags)
            fleet.start(f"i{index}", ("serve", *arguments, "--splitwise-role", "mixed", "--instance-name", f"i{index}"))
        await fleet.wait_for_instances(2)
        async with FrontEnd(fleet.settings) as frontend:
            await burst(frontend, "warm-up", 4)
            capacity = await burst(frontend, "capacity", max(12, count))
            for mode, roles in (("mixed", ("mixed", "mixed")), ("disaggregated", ("prefill", "decode"))):
                await become(fleet, frontend, dict(zip(ports, roles, strict=True)))
                await burst(frontend, f"warm-up-{mode}", 4)
                for load in LOADS:
                    timings[mode, load] = await poisson(frontend, f"{mode}-{load}", count, load * capacity)
        fleet.check()
    rows: list[list[object]] = []
    for (mode, load), found in timings.items():
        ttft, tpot = [t.ttft_ms for t in found], [t.tpot_ms for t in found]
        figures = [percentile(values, share) for values in (ttft, tpot) for share in (0.5, 0.99)]
        rows.append([f"{engine}, {mode}", f"{load * capacity:.1f}", *(f"{figure:.1f}" for figure in figures)])
        report.runs.append(
            {
                "engine": engine,
                "mode": mode,
                "load": load,
                "requests_per_s": round(load * capacity, 2),
                "timings": [{name: round(value, 3) for name, value in asdict(t).items()} for t in found],
            }
        )
    return rows


class Measured(Runner):
    """A runner that counts its thread's CPU time inside the engine's ``step`` and outside of it."""

    def __init__(self, engine: EngineDriver, settings: SchedulerSettings, role: Role) -> None:
        super().__init__(engine, settings, TransferOptions(), RunnerOptions(name=role.value, role=role))
        self.hook_s: list[float] = []
        self.step_s: list[float] = []
        self._in_step_s = 0.0
        self._engine_step = engine.step
        engine.step = self._timed_step  # type: ignore[method-assign]

    def _timed_step(self) -> list[EngineEvent]:
        start = time.thread_time()
        try:
            return self._engine_step()
        finally:
            self._in_step_s = time.thread_time() - start

    def go_round(self) -> bool:
        start = time.thread_time()
        computed = super().go_round()
        if computed:
            self.hook_s.append(time.thread_time() - start - self._in_step_s)
            self.step_s.append(self._in_step_s)
        return computed

    def medians_us(self) -> tuple[float, float]:
        """(hooks, step), of what was measured since the last call."""
        found = tuple(1e6 * statistics.median(values or [0.0]) for values in (self.hook_s, self.step_s))
        self.hook_s.clear()
        self.step_s.clear()
        return found[0], found[1]


async def measure_hooks(engine: str, model: Path, count: int, report: Report) -> list[list[object]]:
    """Median CPU time a step, while KV moves and when nothing but decode goes on."""
    rows: list[list[object]] = []
    with Fleet() as fleet:
        runners = {}
        for role in (Role.PREFILL, Role.DECODE):
            settings = EngineSettings(engine=engine, model=str(model), **FIELDS)
            runners[role] = Measured(load_engine(engine).create(settings, role), fleet.settings, role)
            runners[role].start()
        threads = [threading.Thread(target=runner.run) for runner in runners.values()]
        for thread in threads:
            thread.start()
        try:
            async with FrontEnd(fleet.settings) as frontend:
                await burst(frontend, f"hooks-warm-up-{engine}", 4)
                for runner in runners.values():
                    runner.medians_us()
                # Prefill stays ahead, so that transfers are under way in most of its steps and of decode's.
                await burst(frontend, f"hooks-{engine}", max(16, count))
                measured = [("prefill, KV moves", runners[Role.PREFILL]), ("decode, KV comes in", runners[Role.DECODE])]
                figures = [(name, *runner.medians_us()) for name, runner in measured]
                sampling = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
                stream = await frontend.submit(Request(f"hooks-idle-{engine}", "bench", (5, 6, 7), sampling))
                async for _ in stream:
                    pass
                figures.append(("decode, idle", *runners[Role.DECODE].medians_us()))
        finally:
            for runner in runners.values():
                runner.stop()
            for thread in threads:
                thread.join(30)
            for runner in runners.values():
                runner.close()
                runner.engine.close()
    for name, hooks_us, step_us in figures:
        share = hooks_us / max(step_us, 1e-9)
        rows.append([f"{engine}: {name}", f"{hooks_us:.0f}", f"{step_us:.0f}", f"{100 * share:.1f} %"])
        report.runs.append(
            {"engine": engine, "hooks": name, "hooks_us": round(hooks_us, 1), "step_us": round(step_us, 1)}
        )
        limit = 0.03 if name.endswith("idle") else 0.08
        report.targets.append(at_most(f"{engine}: hooks' part of a step, {name}", share, limit))
    return rows


def main() -> None:
    args = parser(__doc__).parse_args()
    count = 6 if args.quick else 60
    shape = SMALL if args.quick else LARGE
    settings = {
        "model": shape,
        **FIELDS,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": NUM_OUTPUT,
        "requests": count,
    }
    report = Report("engines", settings)
    rows, hook_rows = [], []
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as folder:
        path = make_tiny_model("llama", folder, **shape)
        models = {"transformers": path, "llama_cpp": make_tiny_gguf(path)}
        for engine in ENGINES:
            rows += asyncio.run(asyncio.wait_for(compare(engine, models[engine], count, report), TIMEOUT_S))
            hook_rows += asyncio.run(asyncio.wait_for(measure_hooks(engine, models[engine], count, report), TIMEOUT_S))
    header = ["engine, instances", "requests/s", "TTFT ms p50", "p99", "TPOT ms p50", "p99"]
    print(table(header, rows))
    print()
    print(table(["CPU of the loop's thread a step", "hooks us", "engine us", "hooks' part"], hook_rows))
    print()
    report.finish(args.json)


if __name__ == "__main__":
    main()
