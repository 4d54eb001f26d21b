"""Which processes outlive the one that started them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

GONE_S = 60.0


def survivors(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that live ``GONE_S`` later; they are killed.

    They are nobody's children any more, so there is nothing to await.
    """
    deadline = time.monotonic() + GONE_S
    while (left := [p for p in processes if not _is_gone(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return left


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
