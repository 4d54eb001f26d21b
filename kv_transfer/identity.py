"""Who and where a process is, in terms that a peer on the same host can check."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from functools import lru_cache

PROCESS_NONCE = secrets.token_hex(16)


@lru_cache(maxsize=1)
def host_id() -> str:
    """The same for two processes exactly when they can look each other up under /proc: boot and PID namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown/{PROCESS_NONCE}"


def process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None when there is none. With the pid it names a process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The second field is the command in parentheses, and may hold anything.
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one host.

    Attributes:
        host: ``host_id()`` there.
        start: ``process_start(pid)`` there.
    """

    host: str
    pid: int
    start: int

    @classmethod
    def own(cls) -> ProcessIdentity:
        return cls(host_id(), os.getpid(), process_start(os.getpid()) or 0)

    @property
    def is_visible(self) -> bool:
        """Whether it lives, and under a /proc that this process sees."""
        return self.host == host_id() and process_start(self.pid) == self.start


def open_pidfd(process: ProcessIdentity) -> int | None:
    """A descriptor that turns readable when the process ends, for the caller to close; None when it is not visible."""
    if process.host != host_id():
        return None
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return None
    # Asked after the descriptor is held: from here on the pid cannot be taken by another process unnoticed.
    if process.is_visible:
        return fd
    os.close(fd)
    return None
