"""``splitwise-sched attach``: an instance of a topic on behalf of a ``vllm serve`` that runs already."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.settings import AttachSettings, InstanceSettings
from splitwise_sched.cli.options import settings_command
from splitwise_sched.embedded import scheduler_server
from splitwise_sched.errors import ConfigError
from splitwise_sched.settings import SchedulerSettings

if TYPE_CHECKING:
    from engine.vllm.instance import VllmInstance


@settings_command(AttachSettings, InstanceSettings, SchedulerSettings, name="attach")
def command(attach: AttachSettings, instance: InstanceSettings, scheduler: SchedulerSettings) -> None:
    """Let a `vllm serve` take part in a topic: claim requests for it, have KV moved to or from its peers.

    One of these runs beside each server, which has the connector in its --kv-transfer-config and is otherwise its
    owner's. It needs no vLLM itself. When the server goes, its requests go on elsewhere, and this waits for it to come
    back. Ctrl-C or SIGTERM lets it finish what it holds, for --drain-timeout-s at most; the server is left as it is.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # It has a line for every request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        from engine.vllm.attached import AttachedVllm, AttachOptions
        from engine.vllm.hosting import host
        from engine.vllm.server import VllmServer
    except ModuleNotFoundError as exc:
        raise ConfigError(f"attach needs {exc.name}: pip install 'splitwise-sched[attach]'") from exc

    def make(details: Mapping[str, str]) -> VllmInstance:
        key = attach.vllm_api_key
        options = AttachOptions(
            name=instance.name,
            role=instance.splitwise_role,
            served_model_name=attach.served_model_name,
            max_num_seqs=attach.max_num_seqs,
            max_waiting_tokens=instance.max_waiting_tokens,
            start_timeout_s=attach.vllm_start_timeout_s,
            details=details,
        )
        server = VllmServer(attach.vllm_url, None if key is None else key.get_secret_value())
        return AttachedVllm(found, options, server)

    with scheduler_server(scheduler) as found:
        asyncio.run(host(make, instance, found, f"vLLM at {attach.vllm_url}"))
