"""One private server process: started, watched and ended by its owner; it never outlives it."""

from __future__ import annotations

import atexit
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from splitwise_sched.embedded import die_with_parent
from splitwise_sched.embedded.binary import ServerBinary, locate_server
from splitwise_sched.embedded.directories import OwnedDirectory
from splitwise_sched.embedded.probe import ProbeFailed, ServerIdentity, identify
from splitwise_sched.errors import ConfigError, StoreUnavailable

HOST = "127.0.0.1"
_LOG_FILE = "server.log"
_POLL_S = 0.005
_PORT_ATTEMPTS = 5
# Commands with which whoever reaches the port could write files, load code or replace the data. Nothing here needs
# them, and on a machine with several users loopback alone keeps nobody out.
_REFUSED_COMMANDS = ("config", "module", "replicaof", "slaveof", "debug", "shutdown", "acl")


class EmbeddedServer:
    """A private Redis or Valkey on loopback, without eviction; with an append-only file where its data is to be kept.

    It ends with ``close``, at interpreter exit, and when its owner dies in any way: the kernel kills it with the
    thread that started it, a thread which does nothing else. Any thread may call any method.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        data_dir: Path | None = None,
        unix_socket: Path | None = None,
        password: str | None = None,
        binary: ServerBinary | None = None,
        start_timeout_s: float = 20.0,
    ) -> None:
        """
        Args:
            port: a free one when None.
            data_dir: kept, and the data in it; a temporary directory, removed at close, when None.
            unix_socket: also listen there, for this user alone.
            password: none when None.
            binary: ``locate_server()`` when None.
        """
        self.host = HOST
        self.port = port or 0
        self.password = password
        self._wanted_port = port
        self._data_dir = data_dir
        self._unix_socket = unix_socket
        self._binary = binary
        self._start_timeout_s = start_timeout_s
        self._owner_pid = os.getpid()
        self._directory: OwnedDirectory | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._identity: ServerIdentity | None = None
        self._exited = threading.Event()

    def start(self) -> EmbeddedServer:
        """Start the server; returns when it answers. What a failed start made is undone.

        Raises:
            ConfigError: no server program, port in use, directory in use.
            StoreUnavailable: it ended, or did not answer in time; says what its log says.
        """
        assert self._process is None, "started twice"
        if self._wanted_port is not None:
            _check_port_free(self._wanted_port)
        self._binary = self._binary or locate_server()
        self._directory = OwnedDirectory(self._data_dir)
        atexit.register(self.close)
        try:
            for attempt in range(_PORT_ATTEMPTS):
                self.port = self._wanted_port or _free_port()
                try:
                    self._identity = self._start_once(self._binary, self._directory)
                    return self
                except _PortTaken as exc:
                    if self._wanted_port is not None or attempt == _PORT_ATTEMPTS - 1:
                        raise _port_in_use(self.port) from exc
            raise AssertionError("unreachable")
        except BaseException:
            self.close()
            raise

    def close(self, *, timeout_s: float = 10.0) -> None:
        """End the server and remove its temporary directory. Idempotent; in a fork of the owner it does nothing."""
        if os.getpid() != self._owner_pid:
            return
        atexit.unregister(self.close)
        process, self._process = self._process, None
        if process is not None and not self._exited.is_set():
            process.terminate()
            if not self._exited.wait(timeout_s):
                process.kill()
                self._exited.wait()
        directory, self._directory = self._directory, None
        if directory is not None:
            directory.close()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the server's process has ended, by itself or by ``close``, within ``timeout_s``."""
        return self._exited.wait(timeout_s)

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def server_version(self) -> str:
        """Such as "redis 7.0.15" or "valkey 9.1.2"."""
        return f"{self._running.name} {self._running.version}"

    @property
    def description(self) -> str:
        """Version and origin, for people."""
        assert self._binary is not None
        return self._binary.description

    @property
    def data_dir(self) -> Path:
        assert self._directory is not None, "not started"
        return self._directory.path

    @property
    def log_tail(self) -> str:
        """The last lines that the server logged, on one line."""
        try:
            lines = (self.data_dir / _LOG_FILE).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return " / ".join(line.strip() for line in lines[-3:])

    def __enter__(self) -> EmbeddedServer:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _running(self) -> ServerIdentity:
        assert self._identity is not None, "not started"
        return self._identity

    def _start_once(self, binary: ServerBinary, directory: OwnedDirectory) -> ServerIdentity:
        log = directory.path / _LOG_FILE
        log.unlink(missing_ok=True)
        self._exited = threading.Event()
        started: Future[subprocess.Popen[bytes]] = Future()
        threading.Thread(
            target=_keep,
            args=(binary.path, directory.path, started, self._exited),
            name="embedded-redis-keeper",
            daemon=True,
        ).start()
        try:
            process = started.result()
        except OSError as exc:
            raise StoreUnavailable(f"{binary.path} cannot be started: {exc}") from exc
        self._process = process
        assert process.stdin is not None
        try:
            with process.stdin as configuration:
                configuration.write(self._configuration(directory.path).encode())
        except BrokenPipeError:
            pass  # it has ended: what it logged is told below
        deadline = time.monotonic() + self._start_timeout_s
        failure = "it was not asked yet"
        while time.monotonic() < deadline and not self._exited.wait(_POLL_S):
            try:
                identity = identify(self.host, self.port, password=self.password, timeout_s=1.0)
            except ProbeFailed as exc:
                failure = str(exc)
                continue
            if identity.pid == process.pid:
                return identity
            failure = f"process {identity.pid} answers there"
        tail = self.log_tail
        if "Address already in use" in tail:
            raise _PortTaken(tail)
        state = "ended" if self._exited.is_set() else f"did not answer within {self._start_timeout_s:.0f} s ({failure})"
        raise StoreUnavailable(
            f"the private server {binary.path} on port {self.port} {state}; its log ends with: {tail or 'nothing'}"
        )

    def _configuration(self, directory: Path) -> str:
        """The server's configuration; given on its stdin, so that no password stands in the process list."""
        login = "nopass" if self.password is None else f"#{hashlib.sha256(self.password.encode()).hexdigest()}"
        refused = " ".join(f"-{command}" for command in _REFUSED_COMMANDS)
        lines = [
            f"bind {self.host}",
            f"port {self.port}",
            f"dir {_quote(str(directory))}",
            f"logfile {_quote(str(directory / _LOG_FILE))}",
            "daemonize no",
            f"appendonly {'no' if self._data_dir is None else 'yes'}",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",
            f"user default on {login} ~* &* +@all {refused}",
        ]
        if self._unix_socket is not None:
            lines += [f"unixsocket {_quote(str(self._unix_socket.absolute()))}", "unixsocketperm 700"]
        return "\n".join(lines) + "\n"


class _PortTaken(Exception):
    """Somebody else took the port between the look and the bind."""


def _keep(program: Path, directory: Path, started: Future[subprocess.Popen[bytes]], exited: threading.Event) -> None:
    """Body of the thread that a server lives and dies with."""
    command = [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()), str(program), "-"]
    try:
        # A session of its own: Ctrl-C is for the owner, who ends the server after saying goodbye to it.
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as exc:
        started.set_exception(exc)
        return
    started.set_result(process)
    process.wait()
    exited.set()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


def _check_port_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError as exc:
            raise ConfigError(f"port {port} may not be used by this user: give one from 1024 up") from exc
        except OSError as exc:
            raise _port_in_use(port) from exc


def _port_in_use(port: int) -> ConfigError:
    return ConfigError(
        f"port {port} on {HOST} is in use by another program: give another --port, or end that program "
        f"(`ss -ltnp 'sport = :{port}'` names it)"
    )


def _quote(text: str) -> str:
    """``text`` as one argument of a Redis configuration line."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
