"""The scheduler under zero-work load, beside a polling scheduler over lists: throughput, CPU, latency, costs in Redis.

Instances and front ends are processes of their own that compute nothing, on one private server. CPU is that of all of
them and the server together. Both sides run one after the other on the same server, with the same requests; a figure is
the median over runs. The machine should do nothing else meanwhile; CPU times suffer least where it does.
The server keeps nothing on disk, but for one more closed loop with an append-only file at the end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import redis

from benchmarks.common import Report, at_least, at_most, parser, table
from benchmarks.sched import children, ours, server_facts, theirs
from benchmarks.sched.children import Address, Child
from benchmarks.sched.relay import SlowRelay
from benchmarks.sched.work import Load
from splitwise_sched.embedded.server import EmbeddedServer

WINDOW = 128
SEQUENCES = 64
DELAY_S = 0.02


@dataclass(frozen=True)
class Side:
    """One of the two schedulers that are compared."""

    name: str
    run_instance: Callable[..., None]
    run_frontend: Callable[..., None]


OURS = Side("ours", ours.run_instance, ours.run_frontend)
BASELINE = Side("baseline", theirs.run_instance, theirs.run_frontend)


@dataclass(frozen=True)
class Plan:
    """How much of everything is done; ``scale`` makes loads smaller."""

    num_runs: int
    scale: float
    idle_s: float = 10.0
    pairs: tuple[int, ...] = (1, 4, 16)
    rates: tuple[int, ...] = (50, 500)
    num_decodes: tuple[int, ...] = (8, 64, 512, 4096)

    def num_requests(self, side: Side, num_pairs: int) -> int:
        full = 10_000 if side is OURS else {1: 4000, 4: 2500}.get(num_pairs, 1500)
        return int(full * self.scale)


@dataclass
class Bench:
    """The server of this run, and what was found on it so far."""

    server: EmbeddedServer
    client: redis.Redis
    plan: Plan
    report: Report
    keeps_data: bool = False
    rows: list[list[str]] = field(default_factory=list)
    num_topics: int = 0

    def new_topic(self, side: Side) -> Address:
        self.num_topics += 1
        return Address(self.server.host, self.server.port, f"{side.name}{self.num_topics}")

    def row(self, name: str, ours_text: str, baseline_text: str, target: str) -> None:
        self.rows.append([name, ours_text, baseline_text, target])
        print(f"{name}: {ours_text} | {baseline_text} | {target}", flush=True)

    @contextmanager
    def fleet(self, side: Side, num_pairs: int) -> Iterator[Fleet]:
        with ExitStack() as stack:
            address = self.new_topic(side)
            instances = []
            for i in range(num_pairs):
                for role in ("prefill", "decode"):
                    instances.append(Child(side.run_instance, address, role, f"{role}-{i}"))
                    stack.callback(instances[-1].stop)
            for child in instances:
                child.wait_ready()
                stack.callback(child.begin_stop)
            yield Fleet(self, side, address, instances, stack)


@dataclass
class Fleet:
    """Running instances of one side; ``start_frontend`` before ``run``."""

    bench: Bench
    side: Side
    address: Address
    instances: list[Child]
    stack: ExitStack
    frontend: Child | None = None
    num_loads: int = 0

    def start_frontend(self, at: Address | None = None) -> None:
        self.frontend = Child(self.side.run_frontend, at or self.address)
        self.stack.callback(self.frontend.stop)
        self.frontend.wait_ready()

    def run(self, num_requests: int, **load: Any) -> dict[str, Any]:
        """The load generator's answer, CPU seconds of all processes (``cpu_s``), and ``arrivals`` at prefill."""
        assert self.frontend is not None
        self.num_loads += 1
        processes = [*self.instances, self.frontend]
        client = self.bench.client
        before = [server_facts.cpu_s(client), *(p.cpu_s for p in processes)]
        answer: dict[str, Any] = self.frontend.ask("run", load=Load(f"load{self.num_loads}", num_requests, **load))
        after = [server_facts.cpu_s(client), *(p.cpu_s for p in processes)]
        spent = [b - a for a, b in zip(before, after, strict=True)]
        answer["cpu_s"] = sum(spent)
        answer["server_cpu_s"], answer["frontend_cpu_s"] = spent[0], spent[-1]
        answer["arrivals"] = {}
        for instance in self.instances:
            answer["arrivals"].update(instance.ask("arrivals"))
        return answer


def closed_loop(bench: Bench, num_pairs: int) -> None:
    rates, cpus = {}, {}
    kept = "with AOF" if bench.keeps_data else "no persistence"
    for side in (BASELINE, OURS):
        count = bench.plan.num_requests(side, num_pairs)
        with bench.fleet(side, num_pairs) as fleet:
            fleet.start_frontend()
            fleet.run(max(1000 if side is OURS else 200, count // 10), window=WINDOW)
            answers = [fleet.run(count, window=WINDOW) for _ in range(bench.plan.num_runs)]
        for a in answers:
            per_request = {k: round(a[k] / count * 1e6, 1) for k in ("cpu_s", "server_cpu_s", "frontend_cpu_s")}
            bench.report.runs.append(
                {
                    "closed_loop": side.name,
                    "pairs": num_pairs,
                    "server": kept,
                    "requests_per_s": round(count / a["seconds"], 1),
                    **{k.replace("cpu_s", "cpu_us"): v for k, v in per_request.items()},
                }
            )
        rates[side.name] = median(count / a["seconds"] for a in answers)
        cpus[side.name] = median(a["cpu_s"] / count * 1e3 for a in answers)
    least, times, most_cpu = {1: (8000, 5, 0.22), 4: (8000, 10, 0.24), 16: (7000, 20, 0.28)}[num_pairs]
    ratio = rates["ours"] / rates["baseline"]
    name = f"P=D={num_pairs}" + (", AOF everysec" if bench.keeps_data else "")
    bench.row(
        f"closed loop, {name}: requests/s",
        f"{rates['ours']:,.0f} ({ratio:.1f}x)",
        f"{rates['baseline']:,.0f}",
        f">= {least:,}, {times}x",
    )
    bench.row(f"CPU a request, {name}: ms", f"{cpus['ours']:.3f}", f"{cpus['baseline']:.3f}", f"<= {most_cpu}")
    if bench.keeps_data:
        return
    bench.report.targets += [
        at_least(f"closed loop, {name}, requests/s", rates["ours"], least),
        at_least(f"closed loop, {name}, times the baseline", ratio, times),
        at_most(f"CPU a request, {name}, ms", cpus["ours"], most_cpu),
    ]


def open_loop(bench: Bench) -> None:
    found: dict[tuple[str, int], list[float]] = {}
    for side in (BASELINE, OURS):
        with bench.fleet(side, 1) as fleet:
            fleet.start_frontend()
            fleet.run(200, window=WINDOW)
            for rate in bench.plan.rates:
                count = max(100, int(rate * 5 * bench.plan.scale))
                runs = [_latencies(fleet.run(count, rate=float(rate))) for _ in range(bench.plan.num_runs)]
                for run in runs:
                    names = ("prefill_p50_ms", "prefill_p99_ms", "first_p50_ms", "first_p99_ms")
                    rounded = (round(x, 3) for x in run)
                    bench.report.runs.append(
                        {"open_loop": side.name, "rate": rate, **dict(zip(names, rounded, strict=True))}
                    )
                found[side.name, rate] = [median(column) for column in zip(*runs, strict=True)]
    limits = {50: (1.2, 3.0, 1.6, 4.0), 500: (0.7, 2.5, 1.0, 3.0)}
    for rate in bench.plan.rates:
        mine, other, most = found["ours", rate], found["baseline", rate], limits[rate]
        for i, what in ((0, "submit to prefill"), (2, "submit to first token")):
            name = f"{rate} req/s, {what}: ms p50 (p99)"
            bench.row(
                name,
                f"{mine[i]:.2f} ({mine[i + 1]:.2f})",
                f"{other[i]:.2f} ({other[i + 1]:.2f})",
                f"<= {most[i]} ({most[i + 1]})",
            )
            bench.report.targets += [
                at_most(f"{rate} req/s, {what}, p50 ms", mine[i], most[i]),
                at_most(f"{rate} req/s, {what}, p99 ms", mine[i + 1], most[i + 1]),
            ]


def _latencies(answer: dict[str, Any]) -> list[float]:
    """p50 and p99 in ms of submit to prefill, then of submit to first token."""
    submitted = answer["submitted"]
    result = []
    for when in (answer["arrivals"], answer["first"]):
        ranked = sorted(when[i] - at for i, at in submitted.items())
        result += [ranked[len(ranked) // 2] * 1e3, ranked[int(len(ranked) * 0.99)] * 1e3]
    return result


def commands(bench: Bench) -> None:
    """What is sent to Redis, for a request and by an idle instance; round trips of the front end before prefill."""
    per_request, outputs, idle, trips = {}, {}, {}, {}
    count = int(100 + 200 * bench.plan.scale)
    for side in (BASELINE, OURS):
        with bench.fleet(side, 1) as fleet:
            idle[side.name] = _idle(bench).total() / bench.plan.idle_s / len(fleet.instances)
            fleet.start_frontend()
            fleet.run(100, window=8)
            background = _idle(bench)
            background_per_s = (background.total() - background["outputs"]) / bench.plan.idle_s
            with server_facts.CommandCounter(bench.client) as counter:
                seconds = fleet.run(count, rate=100.0)["seconds"]
            beside_outputs = counter.counts.total() - counter.counts["outputs"]
            per_request[side.name] = (beside_outputs - background_per_s * seconds) / count
            outputs[side.name] = counter.counts["outputs"] / count
        trips[side.name] = round_trips(bench, side)
        bench.report.runs.append(
            {
                "commands": side.name,
                "requests": count,
                "seconds": round(seconds, 2),
                "sent_by_clients": dict(counter.counts),
                "background_per_s": round(background_per_s, 1),
                "idle_per_s_an_instance": round(idle[side.name], 2),
                "round_trips": round(trips[side.name], 2),
            }
        )
    bench.row(
        "commands a request beside outputs", f"{per_request['ours']:.1f}", f"{per_request['baseline']:.1f}", "<= 10"
    )
    bench.row(
        "commands a request that carry outputs, polls too", f"{outputs['ours']:.1f}", f"{outputs['baseline']:.1f}", "-"
    )
    whole = {name: math.ceil(trips[name]) for name in trips}
    bench.row("front-end round trips before prefill", str(whole["ours"]), str(whole["baseline"]), "1")
    bench.row("idle: commands/s an instance", f"{idle['ours']:.2f}", f"{idle['baseline']:.0f}", "<= 3")
    bench.report.targets += [
        at_most("commands a request beside outputs", per_request["ours"], 10),
        at_most("front-end round trips before prefill", whole["ours"], 1),
        at_most("idle commands/s an instance", idle["ours"], 3),
    ]


def _idle(bench: Bench) -> Counter[str]:
    with server_facts.CommandCounter(bench.client) as counter:
        time.sleep(bench.plan.idle_s)
    return counter.counts


def round_trips(bench: Bench, side: Side) -> float:
    """By how many round trips of the front end to the server prefill gets a request later when they take longer."""
    medians = []
    with bench.fleet(side, 1) as fleet, SlowRelay(bench.server.host, bench.server.port, DELAY_S) as relay:
        for at in (fleet.address, Address(relay.host, relay.port, fleet.address.topic)):
            fleet.start_frontend(at)
            fleet.run(5, window=1)
            medians.append(_latencies(fleet.run(15, window=1))[0])
            assert fleet.frontend is not None
            fleet.frontend.stop()
    return (medians[1] - medians[0]) / (2 * DELAY_S * 1e3)


def streaming(bench: Bench) -> None:
    rates, cpus = {}, {}
    for side in (BASELINE, OURS):
        num_tokens = int((4000 if side is OURS else 1500) * bench.plan.scale)
        with bench.fleet(side, 1) as fleet:
            fleet.start_frontend()
            fleet.run(SEQUENCES, window=SEQUENCES, num_tokens=200)
            load = {"window": SEQUENCES, "num_tokens": num_tokens}
            answers = [fleet.run(SEQUENCES, **load) for _ in range(bench.plan.num_runs)]
        rates[side.name] = median(a["tokens"] / a["seconds"] for a in answers)
        cpus[side.name] = median(a["cpu_s"] / a["tokens"] * 1e6 for a in answers)
        for a in answers:
            per_s, cpu_us = round(a["tokens"] / a["seconds"]), round(a["cpu_s"] / a["tokens"] * 1e6, 2)
            bench.report.runs.append({"streaming": side.name, "tokens_per_s": per_s, "cpu_us_a_token": cpu_us})
    ratio = rates["ours"] / rates["baseline"]
    bench.row(
        f"streaming, {SEQUENCES} sequences a step: tokens/s",
        f"{rates['ours']:,.0f} ({ratio:.1f}x)",
        f"{rates['baseline']:,.0f}",
        ">= 300,000, 7x",
    )
    bench.row("CPU a token: us", f"{cpus['ours']:.1f}", f"{cpus['baseline']:.1f}", "-")
    bench.report.targets += [
        at_least("streaming, tokens/s", rates["ours"], 300_000),
        at_least("streaming, times the baseline", ratio, 7),
    ]


def in_the_server(bench: Bench) -> None:
    times = {}
    for num_decodes in bench.plan.num_decodes:
        rounds = max(10, int(40 * bench.plan.scale))
        times[num_decodes] = asyncio.run(server_facts.bind_us(bench.new_topic(OURS), bench.client, num_decodes, rounds))
        bench.report.runs.append({"bind_us": round(times[num_decodes], 2), "decode_instances": num_decodes})
    least, most = min(times), max(times)
    growth = times[most] / times[least]
    texts = " / ".join(f"{us:.1f}" for us in times.values())
    bench.row(
        f"bind with N = {', '.join(map(str, times))}: us", f"{texts} ({growth:.2f}x)", "reads all N", "grows < 1.5x"
    )
    count = max(300, int(2000 * bench.plan.scale))
    beside, body = asyncio.run(server_facts.queued_bytes(bench.new_topic(OURS), bench.client, count))
    bench.report.runs.append({"queued_request_bytes": round(beside), "its_body_bytes": round(body)})
    bench.row("memory of a queued request beside its body: bytes", f"{beside:.0f} (body {body:.0f})", "-", "<= 1024")
    bench.report.targets += [
        at_most(f"bind, growth from {least} to {most} decode instances", growth, 1.5),
        at_most("memory of a queued request beside its body, bytes", beside, 1024),
    ]


def main() -> None:
    args = parser(__doc__).parse_args()
    plan = Plan(num_runs=1, scale=0.1, idle_s=2.0, rates=(500,)) if args.quick else Plan(num_runs=5, scale=1.0)
    children.preload("benchmarks.sched.ours", "benchmarks.sched.theirs")
    report = Report("scheduler", {"window": WINDOW, "prompt_tokens": 256, "runs": plan.num_runs, "scale": plan.scale})
    with EmbeddedServer() as server, redis.Redis(host=server.host, port=server.port) as client:
        report.settings = {**report.settings, "server": server.server_version}
        print(f"{server.server_version}; what | ours | baseline | target")
        bench = Bench(server, client, plan, report)
        for num_pairs in plan.pairs:
            closed_loop(bench, num_pairs)
        open_loop(bench)
        commands(bench)
        streaming(bench)
        in_the_server(bench)
    with (
        TemporaryDirectory() as data,
        EmbeddedServer(data_dir=Path(data)) as server,
        redis.Redis(host=server.host, port=server.port) as client,
    ):
        closed_loop(Bench(server, client, plan, report, keeps_data=True, rows=bench.rows), 1)
    print()
    print(table(["", "ours", "baseline", "target"], bench.rows))
    print()
    report.finish(args.json)


if __name__ == "__main__":
    main()
