"""The gateway as a server: its socket, its front end, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from splitwise_sched.errors import ConfigError
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.gateway.app import create_app
from splitwise_sched.gateway.settings import GatewaySettings
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.tokenizer import Tokenizer

BACKLOG = 2048
# Longer than the pools of usual clients keep a connection, so that it is not closed under a request.
KEEP_ALIVE_S = 75
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GatewayServer:
    """Serves until ``stop`` is called or, in the main thread, until SIGINT or SIGTERM."""

    def __init__(self, settings: GatewaySettings, scheduler: SchedulerSettings) -> None:
        self._settings = settings
        self._scheduler = scheduler
        self._server: _Server | None = None

    async def run(self, on_listening: Callable[[str], None]) -> None:
        """
        Args:
            on_listening: called with the URL once requests are answered.
        Raises:
            ConfigError: the address cannot be listened on, or the tokenizer is not usable.
            StoreUnavailable, StoreUnsuitable: see FrontEnd.start.
        """
        directory = self._settings.model
        tokenizer = None if directory is None else Tokenizer.from_pretrained_dir(directory)
        with contextlib.closing(_listen(self._settings.host, self._settings.port)) as listener:
            async with FrontEnd(self._scheduler, name="gateway") as frontend:
                config = uvicorn.Config(
                    create_app(frontend, self._settings, tokenizer),
                    lifespan="off",
                    ws="none",
                    access_log=False,
                    log_config=None,
                    server_header=False,
                    timeout_keep_alive=KEEP_ALIVE_S,
                    timeout_graceful_shutdown=self._settings.shutdown_timeout_s,
                    backlog=BACKLOG,
                )
                self._server = _Server(config, lambda: on_listening(_url(listener)))
                await self._server.serve(sockets=[listener])

    def stop(self) -> None:
        """Take no more requests; running ones have ``shutdown_timeout_s`` to finish."""
        if self._server is not None:
            self._server.should_exit = True


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Instead of uvicorn's, which raises the signal again at the end: a front end is still to be closed then."""
        loop = asyncio.get_running_loop()
        caught = []
        for number in _SIGNALS:
            # Not in the main thread: whoever runs this calls ``stop``.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, self.handle_exit, number, None)
                caught.append(number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            why, remedy = "another program listens there", "choose another port with --port; 0 takes any that is free"
        elif exc.errno == errno.EACCES:
            why, remedy = "this user may not", "choose a port above 1023 with --port"
        else:
            why, remedy = exc.strerror or str(exc), "give --host an address of this machine, or 0.0.0.0 for all"
        raise ConfigError(f"cannot listen on port {port} of {host!r} ({why}): {remedy}") from exc


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
