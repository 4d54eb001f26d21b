"""Directories and lock files of one user: private, owned by a process, and removed when their owner is gone."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitwise_sched.errors import ConfigError

_OWNER_FILE = ".owner"
_DATA_PREFIX = "data-"
_POLL_S = 0.02


class AlreadyOwned(Exception):
    """Another process holds the lock."""


def private_directory(path: Path) -> Path:
    """``path``, made when missing, that nobody else may enter.

    Raises:
        ConfigError: it is not a directory, or another user could put something in it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as exc:
        raise ConfigError(f"{path} cannot be used as a private directory: {exc.strerror}") from exc
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{path} must be a directory of user {os.geteuid()} with mode 0700, but it has owner {status.st_uid} and "
            f"mode {stat.S_IMODE(status.st_mode):04o}: remove it, or name another place with XDG_RUNTIME_DIR"
        )
    return path


def user_temp_directory() -> Path:
    """This user's own directory among the machine's temporary files."""
    return private_directory(Path(tempfile.gettempdir(), f"splitwise-sched-{os.geteuid()}"))


def try_lock(path: Path) -> int:
    """A descriptor that holds the lock file ``path`` until it is closed, or its process ends in any way.

    Raises:
        AlreadyOwned
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(descriptor)
        raise AlreadyOwned(str(path)) from exc
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Holds the lock file ``path``.

    Raises:
        ConfigError: another process held it all of ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            descriptor = try_lock(path)
            break
        except AlreadyOwned as exc:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"another process has held {path} for {timeout_s:.0f} s: end it (`fuser {path}` names it) and try "
                    "again, or name a server with --scheduler-host"
                ) from exc
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        os.close(descriptor)


class OwnedDirectory:
    """A data directory with one owning process at a time; a temporary one goes with its owner."""

    def __init__(self, path: Path | None = None) -> None:
        """Take ``path`` (made when missing, kept at close), or a new temporary directory.

        Raises:
            ConfigError: ``path`` cannot be used, or another process owns it.
        """
        self._temporary = path is None
        if path is None:
            parent = user_temp_directory()
            _remove_orphans(parent)
            path = Path(tempfile.mkdtemp(prefix=_DATA_PREFIX, dir=parent))
        else:
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as exc:
                raise ConfigError(f"data directory {path} cannot be used: {exc.strerror}") from exc
        self.path = path.resolve()
        try:
            self._lock = try_lock(self.path / _OWNER_FILE)
        except AlreadyOwned as exc:
            raise ConfigError(
                f"data directory {self.path} is in use by another server: stop that one, or name another directory"
            ) from exc
        except OSError as exc:
            raise ConfigError(f"data directory {self.path} cannot be used: {exc.strerror}") from exc

    def close(self) -> None:
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_orphans(parent: Path) -> None:
    """Remove temporary data directories whose owners were killed before they could."""
    for path in parent.glob(f"{_DATA_PREFIX}*"):
        try:
            # No lock file yet: its maker is between mkdtemp and the lock.
            lock = try_lock(path / _OWNER_FILE) if (path / _OWNER_FILE).exists() else None
        except (AlreadyOwned, OSError):
            continue
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
