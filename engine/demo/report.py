"""What the demo found: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from engine.demo.client import Answer


@dataclass(frozen=True, slots=True)
class Row:
    """One request: what its client saw, what its record in Redis says, whether its tokens are right."""

    answer: Answer
    record: Mapping[str, str]
    expected: tuple[int, ...]

    @property
    def matches(self) -> bool:
        return self.answer.token_ids == self.expected

    @property
    def times_ms(self) -> dict[str, float]:
        """Queue, prefill, transfer (after prefill's end) and decode."""
        created, claimed = float(self.record.get("created_ms", 0)), float(self.record.get("claimed_ms", 0))
        times = {name: float(self.record.get(f"{name}_ms", 0)) for name in ("prefill", "transfer", "decode")}
        return {"queue": max(0.0, claimed - created), **times}

    @property
    def kv_bytes(self) -> int:
        return int(self.record.get("kv_bytes", 0))

    @property
    def lane(self) -> str:
        return self.record.get("lane", "")

    def instance(self, leg: str) -> str:
        """Name without the boot nonce."""
        return self.record.get(leg, "").rpartition("-")[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "request_id": self.answer.request.request_id,
            "prompt_tokens": len(self.answer.request.prompt_token_ids),
            "output_tokens": len(self.answer.token_ids),
            "finish_reason": self.answer.finish_reason,
            "prefill_instance": self.instance("prefill"),
            "decode_instance": self.instance("decode"),
            "lane": self.lane,
            "kv_bytes": self.kv_bytes,
            **{f"{name}_ms": value for name, value in self.times_ms.items()},
            "ttft_s": self.answer.ttft_s,
            "tpot_s": self.answer.tpot_s,
            "matches": self.matches,
        }


def percentile(values: Sequence[float], part: float) -> float:
    """The value that ``part`` of all are at or below; 0 without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def summary(rows: Sequence[Row], *, num_prefill: int, num_decode: int, redis_server: str, model: str) -> dict[str, Any]:
    """See the README for the meaning of each field; stable, for programs."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}

    matched = sum(row.matches for row in rows)
    return {
        "requests": len(rows),
        "matched": matched,
        "mismatched": len(rows) - matched,
        "prefill_instances": num_prefill,
        "decode_instances": num_decode,
        "transport": "+".join(sorted({row.lane for row in rows if row.lane not in ("", "local")})) or "none",
        "kv_bytes_moved": sum(row.kv_bytes for row in rows),
        "prompt_tokens": sum(len(row.answer.request.prompt_token_ids) for row in rows),
        "output_tokens": sum(len(row.answer.token_ids) for row in rows),
        "ttft_s": spread([row.answer.ttft_s for row in rows]),
        "tpot_s": spread([row.answer.tpot_s for row in rows if row.answer.tpot_s > 0]),
        "redis_server": redis_server,
        "model": model,
        "instances_used": sorted({row.instance(leg) for row in rows for leg in ("prefill", "decode")} - {""}),
        "per_request": [row.to_dict() for row in rows],
    }


def print_table(console: Console, rows: Sequence[Row]) -> None:
    """Narrow enough for 80 columns; instances are p0, d1 ..., requests their number."""
    lanes = sorted({row.lane for row in rows})
    table = Table(
        title=f"P, D: instances; KV over {', '.join(lanes)}; times in ms, TTFT and TPOT at the HTTP client",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in ("#", "P", "D", "lane") if len(lanes) > 1 else ("#", "P", "D"):
        table.add_column(heading, no_wrap=True)
    for heading in ("in", "out", "queue", "prefill", "transfer", "decode", "TTFT", "TPOT", "KV kB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("=", no_wrap=True)
    for row in rows:
        table.add_row(
            row.answer.request.request_id.rpartition("-")[2],
            _short(row.instance("prefill")),
            _short(row.instance("decode")),
            *([row.lane or "-"] if len(lanes) > 1 else []),
            str(len(row.answer.request.prompt_token_ids)),
            str(len(row.answer.token_ids)),
            *(f"{value:.0f}" for value in row.times_ms.values()),
            f"{1000 * row.answer.ttft_s:.0f}",
            f"{1000 * row.answer.tpot_s:.1f}",
            f"{row.kv_bytes / 1000:.0f}",
            "[green]✓[/]" if row.matches else "[red]✗[/]",
        )
    console.print(table)


def _short(instance: str) -> str:
    role, _, index = instance.partition("-")
    return f"{role[:1]}{index}" if instance else "-"


def print_summary(console: Console, found: Mapping[str, Any], reference: str) -> None:
    """``reference``: what every answer must equal, in words."""
    ttft, tpot = found["ttft_s"], found["tpot_s"]
    console.print(
        f"{found['requests']} requests on {found['prefill_instances']} prefill and {found['decode_instances']} decode "
        f"instances: TTFT p50 {1000 * ttft['p50']:.0f} ms, p99 {1000 * ttft['p99']:.0f} ms; TPOT p50 "
        f"{1000 * tpot['p50']:.1f} ms, p99 {1000 * tpot['p99']:.1f} ms; {found['kv_bytes_moved'] / 1e6:.1f} MB of KV "
        f"over {found['transport']}; {found['redis_server']}"
    )
    if found["mismatched"]:
        console.print(f"[red]{found['mismatched']} of {found['requests']} answers differ from {reference}[/]")
    else:
        console.print(f"[green]every token of all {found['matched']} answers equals {reference}[/]")


def print_differences(console: Console, rows: Sequence[Row], reference: str) -> None:
    """Where each wrong answer leaves the right one, which ``reference`` gave."""
    for row in rows:
        if row.matches:
            continue
        got, want = row.answer.token_ids, row.expected
        at = next(
            (i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), min(len(got), len(want))
        )
        console.print(
            f"{row.answer.request.request_id}: token {at} is {got[at : at + 5]}, {reference} says {want[at : at + 5]}; "
            f"{row.instance('prefill')} -> {row.instance('decode')} over {row.lane}"
        )


def chaos_facts(rows: Sequence[Row], faults: Mapping[str, int], failures: Sequence[str]) -> dict[str, Any]:
    """What was done to the instances, and what it cost."""
    reruns = [max(0, int(row.record.get("attempts", 1)) - 1) for row in rows]
    return {
        **faults,
        "failed": len(failures),
        "failures": list(failures[:20]),
        "requests_run_again": sum(n > 0 for n in reruns),
        "reruns": sum(reruns),
    }


def print_chaos(console: Console, facts: Mapping[str, Any]) -> None:
    console.print(
        f"killed {facts['killed_prefill']} prefill and {facts['killed_decode']} decode instances, stopped "
        f"{facts['stalled_decode']} past their lease: {facts['requests_run_again']} requests were run again, "
        f"{facts['failed']} failed"
    )
    for failure in facts["failures"]:
        console.print(f"[red]{failure}[/]")


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
