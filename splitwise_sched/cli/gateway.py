"""``splitwise-sched gateway``: the OpenAI-compatible HTTP front end."""

from __future__ import annotations

import asyncio
import logging
import signal

import click

from splitwise_sched.cli.options import settings_command
from splitwise_sched.embedded.scheduler import scheduler_server
from splitwise_sched.gateway.server import GatewayServer
from splitwise_sched.gateway.settings import GatewaySettings
from splitwise_sched.settings import SchedulerSettings


@settings_command(GatewaySettings, SchedulerSettings, name="gateway")
def command(gateway: GatewaySettings, scheduler: SchedulerSettings) -> None:
    """Serve /v1/chat/completions, /v1/completions and /v1/models for the instances of a topic.

    Any number of gateways may serve a topic. Ctrl-C or SIGTERM ends this one when its requests have finished, or
    after --shutdown-timeout-s; a second Ctrl-C ends it at once.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Until the server takes signals over itself, SIGTERM is like Ctrl-C: the usual way to end, and no failure.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with scheduler_server(scheduler) as found:
            _run(GatewayServer(gateway, found), found.scheduler_topic)
    except KeyboardInterrupt:
        pass
    click.echo("stopped")


def _run(server: GatewayServer, topic: str) -> None:
    def announce(url: str) -> None:
        click.echo(f"gateway for topic {topic!r} on {url}/v1; {url}/health says whether instances are there")

    try:
        import uvloop
    except ImportError:
        asyncio.run(server.run(announce))
    else:
        uvloop.run(server.run(announce))
