"""One private server for all processes of one user on one machine, found through a small file under a lock.

``server.json`` in the runtime directory names the server. It counts only while the process it names is alive, is the
same process (its start time), and answers; otherwise the next comer replaces it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from splitwise_sched.embedded.directories import locked, private_directory, user_temp_directory
from splitwise_sched.embedded.probe import ProbeFailed, identify
from splitwise_sched.embedded.server import EmbeddedServer
from splitwise_sched.errors import ConfigError, StoreUnavailable

_RECORD_FILE = "server.json"
_LOCK_FILE = "server.lock"
_MAX_RECORD_BYTES = 16_384
_LOCK_TIMEOUT_S = 30.0
_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Record:
    """What ``server.json`` says; the file is its owner's alone (mode 0600)."""

    host: str
    port: int
    pid: int
    started: str
    password: str | None
    description: str

    @staticmethod
    def parse(text: bytes) -> _Record | None:
        """The record in ``text``, or None when it is not one."""
        try:
            fields = json.loads(text)
            record = _Record(**fields)
        except (ValueError, TypeError):
            return None
        texts = (record.host, record.started, record.description, record.password or "")
        numbers = (record.port, record.pid)
        return record if all(type(t) is str for t in texts) and all(type(n) is int for n in numbers) else None

    def to_dict(self) -> Mapping[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


class SharedServer:
    """The private server that this machine's processes of this user share.

    Attributes:
        owner: this process started it, and its end is the server's.
        description: version and origin, for people.
    """

    def __init__(self, record: _Record, runtime_dir: Path, server: EmbeddedServer | None) -> None:
        self.host, self.port, self.password = record.host, record.port, record.password
        self.pid = record.pid
        self.description = record.description
        self.owner = server is not None
        self._record, self._runtime_dir, self._server = record, runtime_dir, server

    def close(self) -> None:
        """The owner ends the server; for others nothing is to be done. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            _withdraw(self._record, self._runtime_dir)
            server.close()

    def __enter__(self) -> SharedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def default_runtime_dir() -> Path:
    """``$XDG_RUNTIME_DIR/splitwise-sched`` where that is this user's, else a directory among temporary files."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if base.is_absolute() and base.is_dir() and base.stat().st_uid == os.geteuid() and os.access(base, os.W_OK):
        return base / "splitwise-sched"
    return user_temp_directory()


def connect_or_start(runtime_dir: Path | None = None, *, password: str | None = None) -> SharedServer:
    """The shared server of this user; started here, and owned by this process, when there is none.

    Blocks for as long as a server takes to start; call it from a worker thread where that matters.

    Args:
        password: of a server that is started here; one that is found brings its own.
    Raises:
        ConfigError: no server program on this machine, or the runtime directory cannot be used.
        StoreUnavailable: the server does not start or, though it runs, does not answer.
    """
    directory = private_directory(runtime_dir or default_runtime_dir())
    with locked(directory / _LOCK_FILE, timeout_s=_LOCK_TIMEOUT_S):
        found = _find(directory)
        if found is not None:
            return SharedServer(found, directory, None)
        server = EmbeddedServer(password=password).start()
        return _publish(server, directory)


def share(server: EmbeddedServer, runtime_dir: Path | None = None) -> SharedServer:
    """Make a started ``server`` the one that ``connect_or_start`` finds; closing the result closes it.

    Raises:
        ConfigError: there is one already.
    """
    directory = private_directory(runtime_dir or default_runtime_dir())
    with locked(directory / _LOCK_FILE, timeout_s=_LOCK_TIMEOUT_S):
        found = _find(directory)
        if found is not None:
            raise ConfigError(
                f"a private server for this user runs already, on {found.host}:{found.port} (process {found.pid}), and "
                "is used by whatever is started without --scheduler-host: use that one, end it, or keep this one to "
                "itself with --no-share"
            )
        return _publish(server, directory)


def _find(directory: Path) -> _Record | None:
    """The live server that the record names, if any. Call with the lock held."""
    try:
        with (directory / _RECORD_FILE).open("rb") as file:
            record = _Record.parse(file.read(_MAX_RECORD_BYTES))
    except FileNotFoundError:
        return None
    if record is None or _start_time(record.pid) != record.started:
        return None
    try:
        identity = identify(record.host, record.port, password=record.password, timeout_s=_PROBE_TIMEOUT_S)
    except ProbeFailed as exc:
        # It may have ended between the two looks; only one that stays is in the way.
        if _start_time(record.pid) != record.started:
            return None
        raise StoreUnavailable(
            f"the private server on {record.host}:{record.port} (process {record.pid}) runs but does not answer: "
            f"{exc}. End it with `kill -9 {record.pid}` and try again, or name another server with --scheduler-host"
        ) from exc
    return record if identity.pid == record.pid else None


def _publish(server: EmbeddedServer, directory: Path) -> SharedServer:
    """Name ``server`` in the record. Call with the lock held."""
    record = _Record(
        host=server.host,
        port=server.port,
        pid=server.pid,
        started=_start_time(server.pid) or "",
        password=server.password,
        description=server.description,
    )
    try:
        temporary = directory / f"{_RECORD_FILE}.{os.getpid()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(record.to_dict(), file)
        temporary.replace(directory / _RECORD_FILE)
    except OSError as exc:
        server.close()
        raise ConfigError(f"{directory} cannot hold the private server's record: {exc.strerror}") from exc
    return SharedServer(record, directory, server)


def _withdraw(record: _Record, directory: Path) -> None:
    """Take the record back, unless it names another server by now."""
    with locked(directory / _LOCK_FILE, timeout_s=_LOCK_TIMEOUT_S):
        path = directory / _RECORD_FILE
        try:
            if _Record.parse(path.read_bytes()[:_MAX_RECORD_BYTES]) == record:
                path.unlink()
        except FileNotFoundError:
            pass


def _start_time(pid: int) -> str | None:
    """When ``pid`` was started, in ticks since boot; None when it is no process, or one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    # proc(5): the name in parentheses may hold anything; after it, field 3 is the state and field 22 the start time.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
