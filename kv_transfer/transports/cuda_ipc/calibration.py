"""Measures the paths between two devices, in a few milliseconds, on memory of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from kv_transfer.transports.cuda_ipc.copies import StreamCopies
from kv_transfer.transports.cuda_ipc.geometry import Family, UnitStep
from kv_transfer.transports.cuda_ipc.kernel import WORD_TYPES
from kv_transfer.transports.cuda_ipc.paths import STRETCH_BYTES, Choice, Path, choose, only
from kv_transfer.transports.cuda_ipc.runtime import CudaFailed, Runtime

log = logging.getLogger("kv_transfer")

# Of each copy that is timed: long enough to tell paths apart, short enough to be allocated beside a full pool.
BYTES = 32 << 20
_TRIES = 3
_TIMEOUT_S = 2.0


def calibrate(runtime: Runtime, copies: StreamCopies, src_device: int, source: tuple[int, int] | None) -> Choice:
    """Time every path at every length; on the copies' stream, before anything else is on it.

    Args:
        source: size and address of memory on ``src_device``, to read from; None for memory of our own. What lies there
            does not matter.

    The kernel alone is chosen when there is no memory to try, or the device does not answer in time. What is allocated
    is freed with ``copies``: freeing device memory waits for everything on the device.
    """
    num_bytes = BYTES if source is None else min(BYTES, source[0])
    if num_bytes < STRETCH_BYTES[0]:
        return only(src_device, Path.KERNEL)
    try:
        dst = copies.allocate(num_bytes)
        src = copies.allocate(num_bytes) if source is None else source[1]
        return choose(src_device, _measure(runtime, copies, src_device, (src, dst), num_bytes), num_bytes)
    except (CudaFailed, TimeoutError) as exc:
        if isinstance(exc, CudaFailed) and exc.is_final:
            raise
        log.warning("cuda_ipc could not be calibrated, and copies by its kernel alone: %s", exc)
        return only(src_device, Path.KERNEL)


def _measure(
    runtime: Runtime, copies: StreamCopies, src_device: int, places: tuple[int, int], num_bytes: int
) -> dict[tuple[Path, int], float]:
    """Seconds for ``num_bytes``, by path and stretch bytes."""
    src, dst = places
    word_bytes = next(size for size in sorted(WORD_TYPES, reverse=True) if (src | dst) % size == 0)
    paths = [Path.KERNEL, Path.COPIES, *([Path.BATCH] if runtime.has_batches else [])]
    seconds: dict[tuple[Path, int], float] = {}
    events = [runtime.create_event(copies.device, timed=True) for _ in range(2)]
    try:
        for size in STRETCH_BYTES:
            count = num_bytes // size
            if not count:
                continue
            step = UnitStep(1, size, size)
            family = Family(size, word_bytes, np.array([src], np.uint64), np.array([dst], np.uint64), step, step)
            # Backwards: neighbours in rising order would be merged into one stretch.
            ids = np.arange(count, dtype=np.int64)[::-1]
            for path in paths:
                choice = only(src_device, path)

                def enqueue(family: Family = family, ids: np.ndarray = ids, choice: Choice = choice) -> None:
                    copies.copy([family], ids, ids, choice)

                enqueue()
                seconds[path, size] = min(_timed(runtime, copies, events, enqueue) for _ in range(_TRIES))
        return seconds
    finally:
        for event in events:
            runtime.destroy_event(event)


def _timed(runtime: Runtime, copies: StreamCopies, events: list[int], enqueue: Callable[[], None]) -> float:
    """Seconds on the device."""
    first, last = events
    runtime.record(copies.device, first, copies.stream)
    enqueue()
    runtime.record(copies.device, last, copies.stream)
    until = time.monotonic() + _TIMEOUT_S
    while not runtime.is_done(last):
        if time.monotonic() > until:
            raise TimeoutError(f"a copy on device {copies.device} takes longer than {_TIMEOUT_S:g} s")
        time.sleep(0.0001)
    return max(runtime.elapsed_ms(first, last) / 1000, 1e-9)
