"""What a run found, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.chaos.kills import Pause
from tests.chaos.spec import RunSpec

MAX_SHOWN = 10
TARGETS_S = {"relocation p50": 2.0, "relocation p99": 3.5, "gap p99": 4.0}


def percentile(values: list[float], part: float) -> float | None:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 3) if ordered else None


@dataclass
class Result:
    """Attributes:
    leaked: what stayed held, reserved, registered or stored; and processes that grew.
    failed: what the harness or a process could not do.
    """

    spec: RunSpec
    server: str
    load_s: float
    requests: dict[str, Any]
    faults: Counter[str]
    skipped: dict[str, int]
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    relocations: list[Pause] = field(default_factory=list)
    gaps: list[Pause] = field(default_factory=list)

    @property
    def problems(self) -> dict[str, list[str]]:
        named = {name: getattr(self, name) for name in ("lost", "wrong", "late", "leaked", "failed")}
        return {name: found for name, found in named.items() if found}

    @property
    def times_s(self) -> dict[str, dict[str, float | int | None]]:
        """Of all kills, and of those without a fault of the server before all was well again."""
        named = {"relocation": self.relocations, "gap": self.gaps}
        served = {f"{name}, server there": [p for p in found if not p.in_outage] for name, found in named.items()}
        return {name: _times([pause.seconds for pause in found]) for name, found in {**named, **served}.items()}

    def to_json(self) -> dict[str, Any]:
        counts = {name: len(getattr(self, name)) for name in ("lost", "wrong", "late", "leaked", "failed")}
        return {
            "spec": asdict(self.spec), "server": self.server, "load_s": round(self.load_s, 1),
            "requests": self.requests, "faults": dict(self.faults), "skipped": self.skipped, "counts": counts,
            "problems": self.problems, "notes": self.notes, "times_s": self.times_s, "targets_s": TARGETS_S,
        }  # fmt: skip

    def table(self) -> str:
        spec, requests = self.spec, self.requests
        rows = [
            ("run", f"plan {spec.plan}, seed {spec.seed}, {self.load_s:.0f} s, on {self.server}"),
            ("requests", f"{requests['submitted']} ({requests['submitted'] / self.load_s:.0f}/s), "
                         f"{requests['tokens']} tokens, {requests['reruns']} re-dispatches"),
            ("ended", _counts(requests["outcomes"])),
            ("refused with an error", _counts(requests["refusals"])),
            ("faults", f"{sum(self.faults.values())}: {_counts(self.faults)}"),
            ("not carried out", _counts(self.skipped)),
            ("killed to running elsewhere", self._told("relocation")),
            ("with the server there", self._told("relocation, server there")),
            ("silence of a killed stream", self._told("gap")),
            ("with the server there", self._told("gap, server there")),
            *((name, str(len(getattr(self, name)))) for name in ("lost", "wrong", "late", "leaked", "failed")),
        ]  # fmt: skip
        lines = [f"{name:>28}  {text}" for name, text in rows if text]
        for name, found in self.problems.items():
            lines += [f"  {name}: {text[:400]}" for text in found[:MAX_SHOWN]]
            if len(found) > MAX_SHOWN:
                lines.append(f"  {name}: and {len(found) - MAX_SHOWN} more")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _told(self, name: str) -> str:
        times = self.times_s[name]
        if not times["count"]:
            return ""
        parts = []
        for part in ("p50", "p99", "max"):
            target = TARGETS_S.get(f"{name.partition(',')[0]} {part}")
            parts.append(f"{part} {times[part]} s" + (f" (target {target:g})" if target else ""))
        return f"{', '.join(parts)}, of {times['count']}"


def _times(seconds: list[float]) -> dict[str, float | int | None]:
    parts = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {**{name: percentile(seconds, part) for name, part in parts.items()}, "count": len(seconds)}


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
