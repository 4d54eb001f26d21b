"""``splitwise-sched serve``: one instance, from its flags to its last request."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from contextlib import ExitStack, closing
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from engine.settings import EngineSettings, InstanceSettings, TransferSettings
from splitwise_sched.cli.options import settings_command
from splitwise_sched.embedded import scheduler_server
from splitwise_sched.errors import ConfigError
from splitwise_sched.settings import SchedulerSettings

if TYPE_CHECKING:
    from engine.runner import Runner
    from splitwise_sched.types import Role


@settings_command(EngineSettings, InstanceSettings, TransferSettings, SchedulerSettings, name="serve")
def command(
    engine: EngineSettings, instance: InstanceSettings, transfer: TransferSettings, scheduler: SchedulerSettings
) -> None:
    """Run an instance: it claims requests of its topic, computes its part, and moves KV blocks to or from its peers.

    Ctrl-C or SIGTERM lets it finish what it holds, for --drain-timeout-s at most; a second one ends it at once, and
    what it holds goes back to the queue.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from engine.plugins import load_service

    if (service := load_service(engine.engine)) is not None:
        service.serve(engine, instance, transfer, scheduler)
        return
    if engine.tensor_parallel_size != 1:
        raise ConfigError(
            f"--tensor-parallel-size is {engine.tensor_parallel_size}: the engine {engine.engine!r} has one rank; "
            "vllm may have more"
        )
    if engine.engine_args is not None:
        raise ConfigError(f"--engine-args was given: the engine {engine.engine!r} has none but the flags of serve")
    with ExitStack() as stack:
        _serve(stack, engine, instance, transfer, scheduler)


def _serve(
    stack: ExitStack,
    engine_settings: EngineSettings,
    instance: InstanceSettings,
    transfer_settings: TransferSettings,
    scheduler: SchedulerSettings,
) -> None:
    from engine.instance_http import InstanceHttp
    from engine.plugins import load_engine
    from engine.runner import Runner, RunnerOptions
    from kv_transfer.transports.registry import preflight
    from splitwise_sched.connection import check

    role = instance.splitwise_role
    plugin = load_engine(engine_settings.engine)
    transfer = transfer_settings.options(engine_settings.tensor_parallel_size)
    status: dict[str, Any] = {}

    def change_role(role: Role) -> None:
        if (runner := status.get("runner")) is not None:
            runner.change_role(role, instance.drain_timeout_s)

    ports = []
    if instance.port is not None:
        http = InstanceHttp(instance.host, instance.port, lambda: _status(status), change_role=change_role)
        ports.append(stack.enter_context(closing(http)))
    if instance.metrics_port is not None:
        http = InstanceHttp(instance.host, instance.metrics_port, lambda: _status(status), metrics_only=True)
        ports.append(stack.enter_context(closing(http)))
    scheduler = stack.enter_context(scheduler_server(scheduler))
    # What can be wrong is found before the model is loaded, which may take minutes.
    asyncio.run(check(scheduler))
    preflight(transfer, is_on_device=engine_settings.device != "cpu")
    click.echo(f"loading {engine_settings.model} ...", err=True)
    driver = stack.enter_context(closing(plugin.create(engine_settings, role)))
    details = {
        "engine": engine_settings.engine,
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "address": f"{instance.host}:{ports[0].port}" if ports else "",
        "tokenizer": str(plugin.tokenizer_dir(engine_settings) or ""),
    }
    runner_options = RunnerOptions(
        name=instance.name, role=role, max_waiting_tokens=instance.max_waiting_tokens, details=details
    )
    runner = Runner(driver, scheduler, transfer, runner_options)
    end_on_signals(runner, instance.drain_timeout_s)
    stack.enter_context(closing(runner))
    runner.start()
    assert runner.instance is not None
    status.update(runner=runner, topic=scheduler.scheduler_topic, lease_s=scheduler.instance_lease_s)
    for port in ports:
        port.start()
    spec = driver.spec
    click.echo(
        f"{role.value} instance {runner.instance.instance_id} serves {spec.model!r} on topic "
        f"{scheduler.scheduler_topic!r} through {runner.instance.server} at "
        f"{runner.instance.address}; {spec.num_blocks} KV blocks of {spec.block_size} "
        f"tokens, transports {', '.join(transfer.protocols)}"
        + "".join(f"; http://{instance.host}:{port.port}" for port in ports)
    )
    runner.run()
    click.echo(f"stopped; {runner.instance.num_held} requests that it held are back in the queue", err=True)


def end_on_signals(runner: Runner, drain_timeout_s: float) -> None:
    """The first SIGTERM or Ctrl-C drains the instance; a second one ends it at once, and its work goes back."""
    seen: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if seen:
            runner.stop()
        else:
            seen.append(number)
            runner.drain(drain_timeout_s)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)


def _status(source: dict[str, Any]) -> dict[str, Any]:
    runner = source["runner"]
    went_round_s = time.monotonic() - runner.went_round_at
    transfer = {f"kv_{name}": value for name, value in runner.ranks.counters().items()}
    return {
        "healthy": went_round_s < source["lease_s"],
        "instance_id": runner.instance.instance_id if runner.instance is not None else "",
        "role": runner.role.value,
        "model": runner.engine.spec.model,
        "topic": source["topic"],
        "went_round_s": round(went_round_s, 3),
        "load": runner.load(),
        "totals": {**runner.totals(), **transfer},
    }
