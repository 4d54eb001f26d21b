"""What a run found, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

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
    relocations_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    @property
    def problems(self) -> dict[str, list[str]]:
        named = {name: getattr(self, name) for name in ("lost", "wrong", "late", "leaked", "failed")}
        return {name: found for name, found in named.items() if found}

    @property
    def times_s(self) -> dict[str, float | None]:
        return {
            "relocation p50": percentile(self.relocations_s, 0.5),
            "relocation p99": percentile(self.relocations_s, 0.99),
            "gap p50": percentile(self.gaps_s, 0.5),
            "gap p99": percentile(self.gaps_s, 0.99),
        }

    def to_json(self) -> dict[str, Any]:
        counts = {name: len(getattr(self, name)) for name in ("lost", "wrong", "late", "leaked", "failed")}
        return {
            "spec": asdict(self.spec), "server": self.server, "load_s": round(self.load_s, 1),
            "requests": self.requests, "faults": dict(self.faults), "skipped": self.skipped, "counts": counts,
            "problems": self.problems, "notes": self.notes, "times_s": self.times_s, "targets_s": TARGETS_S,
            "num_relocations": len(self.relocations_s), "num_gaps": len(self.gaps_s),
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
            ("killed to running elsewhere", self._times("relocation", len(self.relocations_s))),
            ("silence of a killed stream", self._times("gap", len(self.gaps_s))),
            *((name, str(len(getattr(self, name)))) for name in ("lost", "wrong", "late", "leaked", "failed")),
        ]  # fmt: skip
        lines = [f"{name:>28}  {text}" for name, text in rows if text]
        for name, found in self.problems.items():
            lines += [f"  {name}: {text[:400]}" for text in found[:MAX_SHOWN]]
            if len(found) > MAX_SHOWN:
                lines.append(f"  {name}: and {len(found) - MAX_SHOWN} more")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _times(self, name: str, count: int) -> str:
        if not count:
            return ""
        parts = []
        for part in ("p50", "p99"):
            target = TARGETS_S.get(f"{name} {part}")
            parts.append(f"{part} {self.times_s[f'{name} {part}']} s" + (f" (target {target:g})" if target else ""))
        return f"{', '.join(parts)}, of {count}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
