"""What was found of hooks and transfers, as rows of tables, runs and targets; the same for every engine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common import Report, at_most

LONG_PROMPT, NUM_LONG = 512, 5
IDLE_LIMIT, MOVING_LIMIT, EXPOSED_LIMIT = 0.03, 0.08, 0.20


@dataclass(frozen=True)
class Overlap:
    """Of one transfer, on one clock.

    Attributes:
        begin: its first blocks were ready to be sent.
        prefilled: the first token was there, or the last blocks were.
        decoding: decode's first step with this request began.
    """

    begin: float
    prefilled: float
    decoding: float

    @property
    def exposed_s(self) -> float:
        return self.decoding - self.prefilled

    @property
    def whole_s(self) -> float:
        return self.decoding - self.begin


def report_hooks(engine: str, figures: Mapping[str, tuple[float, float]], report: Report) -> list[list[object]]:
    """
    Args:
        figures: (hooks, step) in µs, by what went on meanwhile.
    """
    rows: list[list[object]] = []
    for name, (hooks_us, step_us) in figures.items():
        share = hooks_us / max(step_us, 1e-9)
        rows.append([f"{engine}: {name}", f"{hooks_us:.0f}", f"{step_us:.0f}", f"{100 * share:.1f} %"])
        report.runs.append(
            {"engine": engine, "hooks": name, "hooks_us": round(hooks_us, 1), "step_us": round(step_us, 1)}
        )
        limit = IDLE_LIMIT if name.endswith("idle") else MOVING_LIMIT
        report.targets.append(at_most(f"{engine}: hooks' part of a step, {name}", share, limit))
    return rows


def report_overlap(engine: str, found: Sequence[Overlap], report: Report) -> list[list[object]]:
    exposed, whole = (
        statistics.median(values) for values in ([o.exposed_s for o in found], [o.whole_s for o in found])
    )
    share = statistics.median(o.exposed_s / o.whole_s for o in found)
    for overlap in found:
        report.runs.append(
            {
                "engine": engine,
                "overlap": "512-token prompt",
                "exposed_ms": round(1000 * overlap.exposed_s, 3),
                "whole_ms": round(1000 * overlap.whole_s, 3),
            }
        )
    report.targets.append(at_most(f"{engine}: part of a transfer after prefill's end", share, EXPOSED_LIMIT))
    return [[engine, f"{1000 * exposed:.1f}", f"{1000 * whole:.1f}", f"{100 * share:.1f} %"]]
