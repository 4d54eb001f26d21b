"""Requests to two instances of an engine: once as prefill and decode, once as two that do both."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import Report
from engine.demo.fleet import Fleet, free_port
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.types import Request, SamplingParams

LOADS, QUICK_LOADS = (0.25, 0.5, 0.8), (0.5,)
PROMPT_TOKENS = (32, 256)
NUM_OUTPUT = 24
READY_S = 400.0


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


async def one(frontend: FrontEnd, request_id: str, num_prompt: int, num_output: int) -> None:
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    # No two prompts begin alike: nothing of them is in a prefix cache.
    rng = random.Random(request_id)
    prompt = tuple(rng.randrange(3, 1000) for _ in range(num_prompt))
    async for _ in await frontend.submit(Request(request_id, "bench", prompt, sampling)):
        pass


async def compare(  # noqa: PLR0917
    engine: str,
    model: Path,
    fields: Mapping[str, Any],
    count: int,
    loads: Sequence[float],
    report: Report,
    when_disaggregated: Callable[[FrontEnd], Awaitable[None]] | None = None,
) -> list[list[object]]:
    """Rows of the table, for one engine.

    Args:
        fields: settings of EngineSettings.
        count: requests a load.
        loads: of what two mixed instances get through.
        when_disaggregated: called once while one instance is prefill and the other decode, and nothing runs.
    """
    flags = [f for name, value in fields.items() for f in (f"--{name.replace('_', '-')}", str(value))]
    timings: dict[tuple[str, float], list[Timing]] = {}
    ports = {free_port(): "mixed" for _ in range(2)}
    with Fleet() as fleet:
        for index, port in enumerate(ports):
            arguments = ("--engine", engine, "--model", str(model), "--port", str(port), *flags)
            fleet.start(f"i{index}", ("serve", *arguments, "--splitwise-role", "mixed", "--instance-name", f"i{index}"))
        await fleet.wait_for_instances(2, READY_S)
        async with FrontEnd(fleet.settings) as frontend:
            await burst(frontend, "warm-up", 4)
            capacity = await burst(frontend, "capacity", max(12, count))
            for mode, roles in (("mixed", ("mixed", "mixed")), ("disaggregated", ("prefill", "decode"))):
                await become(fleet, frontend, dict(zip(ports, roles, strict=True)))
                await burst(frontend, f"warm-up-{mode}", 4)
                for load in loads:
                    timings[mode, load] = await poisson(frontend, f"{mode}-{load}", count, load * capacity)
            if when_disaggregated is not None:
                await when_disaggregated(frontend)
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
