"""A vLLM instance's process: its HTTP ports, its signals, from its start to its last request."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from engine.settings import InstanceSettings
from engine.vllm.instance import VllmInstance
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Role


async def host(
    make: Callable[[Mapping[str, str]], VllmInstance],
    settings: InstanceSettings,
    scheduler: SchedulerSettings,
    what: str,
) -> None:
    """Run an instance until it ends.

    Args:
        make: of the lease record's further fields; called when everything but vLLM was found to be right.
        what: it runs on, for people.
    Raises:
        SplitwiseError, KVTransferError
    """
    from splitwise_sched.connection import check

    loop = asyncio.get_running_loop()
    served: list[VllmInstance] = []

    def status() -> dict[str, Any]:
        return _status(served[0], scheduler)

    def change_role(role: Role) -> None:
        asyncio.run_coroutine_threadsafe(served[0].change_role(role, settings.drain_timeout_s), loop)

    with ExitStack() as stack:
        ports = []
        if settings.port is not None or settings.metrics_port is not None:
            from engine.instance_http import InstanceHttp

            if settings.port is not None:
                http = InstanceHttp(settings.host, settings.port, status, change_role=change_role)
                ports.append(stack.enter_context(closing(http)))
            if settings.metrics_port is not None:
                http = InstanceHttp(settings.host, settings.metrics_port, status, metrics_only=True)
                ports.append(stack.enter_context(closing(http)))
        # What can be wrong is found before the model is loaded, which may take minutes.
        await check(scheduler)
        details = {
            "engine": "vllm",
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "address": f"{settings.host}:{ports[0].port}" if ports else "",
        }
        instance = make(details)
        try:
            await instance.start()
            served.append(instance)
            _end_on_signals(instance, settings.drain_timeout_s)
            for port in ports:
                port.start()
            click.echo(
                f"{instance.role.value} instance {instance.instance_id} serves {instance.model!r} on topic "
                f"{scheduler.scheduler_topic!r} through {instance.server}; {what}"
                + "".join(f"; http://{settings.host}:{port.port}" for port in ports)
            )
            await instance.run()
        finally:
            num_held = instance.num_held
            await instance.close()
    click.echo(f"stopped; {num_held} requests that it held are back in the queue", err=True)


def local_dir(model: str) -> str:
    """The directory from which a gateway on this machine can read the model's tokenizer, or ""."""
    path = Path(model)
    return str(path.resolve()) if path.is_dir() else ""


def _end_on_signals(instance: VllmInstance, drain_timeout_s: float) -> None:
    """The first SIGTERM or Ctrl-C drains the instance; a second one ends it at once, and its work goes back."""
    seen: list[int] = []

    def on_signal(number: int) -> None:
        if seen:
            instance.stop()
        else:
            seen.append(number)
            instance.drain(drain_timeout_s)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)


def _status(instance: VllmInstance, scheduler: SchedulerSettings) -> dict[str, Any]:
    heard_s = time.monotonic() - instance.heard_at
    return {
        "healthy": bool(instance.instance_id) and heard_s < scheduler.instance_lease_s,
        "instance_id": instance.instance_id,
        "role": instance.role.value,
        "model": instance.model,
        "topic": scheduler.scheduler_topic,
        "went_round_s": round(heard_s, 3),
        "load": instance.load(),
        "totals": asdict(instance.stats),
    }
