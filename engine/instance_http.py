"""An instance's HTTP side: is it well, what does it hold, its metrics. In a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from splitwise_sched.errors import ConfigError
from splitwise_sched.types import Role

START_TIMEOUT_S = 10.0
MAX_ROLE_CHARS = 64
Status = Callable[[], dict[str, Any]]


class StatusCollector:
    """Prometheus metrics out of the numbers in a status."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        labels = {name: str(status[name]) for name in ("role", "model", "topic")}
        for group, family, suffix in (("load", GaugeMetricFamily, ""), ("totals", CounterMetricFamily, "_total")):
            for name, value in sorted(status[group].items()):
                metric = family(f"splitwise_instance_{name}{suffix}", f"{name} of the instance", labels=list(labels))
                metric.add_metric(list(labels.values()), float(value))
                yield metric


class InstanceHttp:
    """``/health``, ``/load``, ``/role`` (POST) and ``/metrics`` on one port, and ``/metrics`` alone on others.

    The port is taken on construction (ConfigError when it cannot be); ``start`` serves, ``close`` ends it.
    """

    def __init__(
        self,
        host: str,
        port: int,
        status: Status,
        *,
        change_role: Callable[[Role], None] | None = None,
        metrics_only: bool = False,
    ) -> None:
        self._socket = bind(host, port, "--metrics-port" if metrics_only else "--port")
        self._registry = CollectorRegistry()
        self._registry.register(StatusCollector(status))
        self._status = status
        routes = [Route("/metrics", self._metrics)]
        if not metrics_only:
            routes += [Route("/health", self._health), Route("/load", self._load)]
        if change_role is not None:
            routes.append(Route("/role", self._change_role, methods=["POST"]))
        self._role = change_role
        config = uvicorn.Config(Starlette(routes=routes), log_level="warning", access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="splitwise-http", daemon=True)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(START_TIMEOUT_S)
        self._socket.close()

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])

    async def _health(self, request: Request) -> Response:
        status = self._status()
        return JSONResponse(status, status_code=200 if status["healthy"] else 503)

    async def _load(self, request: Request) -> Response:
        return JSONResponse(self._status()["load"])

    async def _change_role(self, request: Request) -> Response:
        assert self._role is not None
        wanted = (await request.body())[:MAX_ROLE_CHARS].decode(errors="replace").strip()
        try:
            role = Role(wanted)
        except ValueError:
            known = ", ".join(role.value for role in Role)
            return JSONResponse({"error": f"{wanted!r} is no role: send one of {known}"}, status_code=400)
        self._role(role)
        return JSONResponse({"role": role.value, "note": "it finishes what it holds first"}, status_code=202)

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket. Raises ConfigError naming the flag when host and port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except OSError as exc:
        sock.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({exc.strerror or exc}): give another {flag}, or end what uses it"
        ) from exc
    return sock
