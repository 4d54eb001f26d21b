"""The server for a process's settings: the one they name, else this user's private one."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from splitwise_sched.embedded.rendezvous import connect_or_start
from splitwise_sched.settings import SchedulerSettings

logger = logging.getLogger(__name__)


@contextmanager
def scheduler_server(settings: SchedulerSettings, runtime_dir: Path | None = None) -> Iterator[SchedulerSettings]:
    """``settings`` that name a server, for as long as the block runs.

    Settings that name one come back as they are. Else this user's private server is found, or started and, by
    the process that started it, ended with the block. Blocks for as long as a start takes.

    Raises:
        ConfigError, StoreUnavailable: see ``connect_or_start``.
    """
    if settings.names_a_server:
        yield settings
        return
    password = settings.scheduler_password
    # Loopback is open to every user of the machine; whoever may find the server finds its password with it.
    wanted = secrets.token_urlsafe(24) if password is None else password.get_secret_value()
    with connect_or_start(runtime_dir, password=wanted) as server:
        what = "started" if server.owner else "found"
        logger.info("%s the private server %s on %s:%d", what, server.description, server.host, server.port)
        yield settings.model_copy(
            update={
                "scheduler_host": server.host,
                "scheduler_port": server.port,
                "scheduler_username": None,
                "scheduler_password": None if server.password is None else SecretStr(server.password),
            }
        )
