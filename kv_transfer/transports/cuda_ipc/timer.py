"""A clock for the messenger's loop that is finer than its milliseconds."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from kv_transfer.reactor import READ, Channel

# Absent from Python before 3.13.
_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK_CLOEXEC = 0o4000 | 0o2000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class _TimerSpec(ctypes.Structure):
    """struct itimerspec: period, then first expiry; seconds and nanoseconds each."""

    _fields_ = (
        ("period_s", ctypes.c_long),
        ("period_ns", ctypes.c_long),
        ("first_s", ctypes.c_long),
        ("first_ns", ctypes.c_long),
    )


class Timer(Channel):
    """Calls ``on_time`` every so often while it is set. Nothing at all happens while it is not."""

    def __init__(self, on_time: Callable[[], None]) -> None:
        self._on_time = on_time
        self._period_us = 0
        self._fd: int = _LIBC.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def set(self, period_us: int) -> None:
        """Every ``period_us`` from now on; 0 for no more. As it is when it was set so before."""
        if period_us == self._period_us or self._fd < 0:
            return
        self._period_us = period_us
        spec = _TimerSpec(0, period_us * 1000, 0, period_us * 1000)
        if _LIBC.timerfd_settime(self._fd, 0, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def fileno(self) -> int:
        return self._fd

    def interest(self) -> int:
        return READ

    def ready(self, mask: int) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            # It was set anew since it went off.
            return
        self._on_time()

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1
