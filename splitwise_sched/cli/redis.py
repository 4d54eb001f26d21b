"""``splitwise-sched redis``: a private server in the foreground, or a look at the server that is named."""

from __future__ import annotations

import asyncio
import shlex
import signal
from pathlib import Path

import click
from pydantic import Field, SecretStr

from splitwise_sched.cli.options import settings_command
from splitwise_sched.connection import check
from splitwise_sched.embedded import EmbeddedServer, share
from splitwise_sched.errors import StoreUnavailable
from splitwise_sched.settings import ExplicitSettings, SchedulerSettings


class PrivateServerSettings(ExplicitSettings):
    """The private server's own settings; its password is the scheduler's."""

    port: int | None = Field(
        None, ge=1, le=65535, description="Loopback port to listen on. Left out: any that is free."
    )
    data_dir: Path | None = Field(
        None, description="Directory that keeps the data. Left out: a temporary one, removed at the end."
    )
    unix_socket: Path | None = Field(None, description="Listen on this socket file too; for this user alone.")
    share: bool = Field(
        True, description="Let what this user starts on this machine without --scheduler-host use the server."
    )


@settings_command(PrivateServerSettings, SchedulerSettings, name="redis")
def command(server: PrivateServerSettings, scheduler: SchedulerSettings) -> None:
    """Run a private Redis or Valkey server, or check the one, or the several, that the flags name.

    The private server listens on loopback only, keeps its data with --data-dir, never evicts, and ends with this
    command: with Ctrl-C, SIGTERM, or however it dies. It is redis-server or valkey-server from PATH, else the one
    that comes with splitwise-sched[embedded].
    """
    if scheduler.names_a_server:
        _check(scheduler)
    else:
        _serve(server, scheduler.scheduler_password)


def _check(settings: SchedulerSettings) -> None:
    for connection in asyncio.run(check(settings)):
        shard = f", shard {connection.keys.shard}" if settings.scheduler_shards > 1 else ""
        click.echo(
            f"{connection.server} at {connection.node} can carry topic {settings.scheduler_topic!r}{shard}: it "
            "answers, grants access, is new enough, and does not evict"
        )
        for advice in connection.advice:
            click.echo(f"advice: {advice}")


def _serve(settings: PrivateServerSettings, password: SecretStr | None) -> None:
    # SIGTERM ends the server as Ctrl-C does; both are the usual way, and no failure.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with EmbeddedServer(
            port=settings.port,
            data_dir=settings.data_dir,
            unix_socket=settings.unix_socket,
            password=None if password is None else password.get_secret_value(),
        ) as server:
            shared = share(server) if settings.share else None
            try:
                _announce(server, is_shared=settings.share)
                server.wait()
                raise StoreUnavailable(
                    f"the private server ended by itself; its log ends with: {server.log_tail or 'nothing'}"
                )
            finally:
                if shared is not None:
                    shared.close()
    except KeyboardInterrupt:
        click.echo("stopped")


def _announce(server: EmbeddedServer, *, is_shared: bool) -> None:
    flags = f"--scheduler-host {server.host} --scheduler-port {server.port}"
    needs_password = server.password is not None
    click.echo(f"{server.description} on {server.host}:{server.port}, data in {shlex.quote(str(server.data_dir))}")
    if is_shared:
        click.echo("serve and gateway find it by themselves on this machine; the flags are:")
    else:
        click.echo("serve and gateway find it with:")
    click.echo(f"  {flags}" + (" --scheduler-password ..." if needs_password else ""))
    click.echo(f"look inside: redis-cli -p {server.port}" + (" --askpass" if needs_password else ""))
    click.echo("Ctrl-C ends it")
