"""Which way of copying is the fastest for stretches of which length, measured at start on the very devices.

Published figures disagree, and differ by device, link and driver: so nothing is believed, and a few milliseconds are
spent on finding out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Path(Enum):
    """
    KERNEL: one launch for everything, with addresses worked out on the device.
    COPIES: ``cudaMemcpyPeerAsync`` for each stretch.
    BATCH: one ``cudaMemcpyBatchAsync`` for all stretches.
    """

    KERNEL = "kernel"
    COPIES = "copies"
    BATCH = "batch"


# Lengths that are measured. Below the first one, the cost of a call for each stretch exceeds any copy's time.
STRETCH_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
# Another path than the kernel must be better by this much, so that noise does not choose.
_MARGIN = 1.05


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Attributes:
        src_device: that the copies read from.
        steps: ``(stretch bytes from which on, path)``, rising; the kernel below the first.
        measured: GB/s by path and stretch bytes, for people; empty when nothing was measured.
    """

    src_device: int
    steps: tuple[tuple[int, Path], ...] = ()
    measured: tuple[tuple[Path, int, float], ...] = ()

    def path_for(self, mean_stretch_bytes: float) -> Path:
        path = Path.KERNEL
        for least, better in self.steps:
            if mean_stretch_bytes >= least:
                path = better
        return path

    def describe(self) -> str:
        """For the log."""
        text = "the copy kernel"
        for least, path in self.steps:
            text += f", from {least >> 10} KiB stretches on {path.value}"
        if not self.measured:
            return text + " (not calibrated)"
        figures = "; ".join(f"{path.value} {size >> 10} KiB {rate:.0f} GB/s" for path, size, rate in self.measured)
        return f"{text} ({figures})"


def choose(src_device: int, seconds: Mapping[tuple[Path, int], float], num_bytes: int) -> Choice:
    """From the time that each path took for ``num_bytes`` in stretches of each length."""
    sizes = sorted({size for _, size in seconds})
    steps: list[tuple[int, Path]] = []
    current = Path.KERNEL
    for size in sizes:
        times = {path: seconds[path, size] for path in Path if (path, size) in seconds}
        best = min(times, key=lambda path: times[path])
        if best is not current and times[current] > times[best] * _MARGIN:
            steps.append((size, best))
            current = best
    measured = tuple((path, size, num_bytes / s / 1e9) for (path, size), s in sorted(seconds.items(), key=_by_size))
    return Choice(src_device, tuple(steps), measured)


def only(src_device: int, path: Path) -> Choice:
    """One path for everything."""
    return Choice(src_device, () if path is Path.KERNEL else ((0, path),))


def _by_size(item: tuple[tuple[Path, int], float]) -> tuple[int, str]:
    (path, size), _ = item
    return size, path.value
