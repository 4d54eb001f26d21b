"""The verbs on a Redis Cluster, on a topic of two shards: HTTP in, right tokens out, also after a node has died."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.testing import make_tiny_model
from splitwise_sched.embedded import die_with_parent
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from tests.conftest import missing
from tests.e2e.reference import generate
from tests.engine_drivers import greedy, random_prompt
from tests.integration.toy import until
from tests.redis_rigs import Cluster, any_program, slot_of

SHARDS = 2


@asynccontextmanager
async def verb(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """``splitwise-sched <arguments>`` while the block runs; its output is read from ``stdout``."""
    command = [sys.executable, die_with_parent.__file__, str(os.getpid()), sys.executable, "-m", "splitwise_sched"]
    process = await asyncio.create_subprocess_exec(
        *command, *map(str, arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.communicate(), 60)


async def said(process: asyncio.subprocess.Process, words: str) -> str:
    """The line with ``words`` in it."""
    assert process.stdout is not None
    lines = []
    while True:
        line = (await asyncio.wait_for(process.stdout.readline(), 90)).decode()
        lines.append(line)
        if words in line:
            return line
        assert line, "".join(lines)


async def test_serve_and_gateway_work_on_a_cluster_of_shards_and_survive_the_death_of_a_node(
    tmp_path: Path, topic: str
):
    try:
        program = any_program()
    except LookupError as exc:
        missing(str(exc))
    model = make_tiny_model("llama", tmp_path)
    requests = [greedy(random_prompt(30, seed), 12, f"r{seed}") for seed in range(8)]
    expected = generate(model, requests)
    with Cluster(program, topic=topic) as cluster:
        flags = (
            "--scheduler-cluster-nodes", ",".join(cluster.node_addresses), "--scheduler-topic", topic,
            "--scheduler-shards", SHARDS, "--redis-timeout-s", 30,
        )  # fmt: skip
        serve = ("serve", "--model", model, "--served-model-name", "tiny", "--num-gpu-blocks-override", 100, *flags)
        gateway = ("gateway", "--port", 0, "--model", model, *flags)
        async with (
            verb(*serve, "--splitwise-role", "mixed", "--instance-name", "m0") as one,
            verb(*serve, "--splitwise-role", "mixed", "--instance-name", "m1") as other,
            verb(*gateway) as front,
        ):
            for process in (one, other):
                await said(process, "instance")
            url = next(word for word in (await said(front, "http")).split() if word.startswith("http"))
            fields = {**cluster.settings_fields(), "scheduler_topic": topic, "scheduler_shards": SHARDS}
            async with (
                FrontEnd(SchedulerSettings(**fields, redis_timeout_s=30)) as onlooker,
                httpx.AsyncClient(base_url=url.removesuffix("/v1;"), timeout=60) as client,
            ):
                # One in each shard.
                async def are_placed() -> bool:
                    return [len(records) for records in await onlooker.instances_by_shard()] == [1] * SHARDS

                await until(are_placed)

                async def answer(request: Any, suffix: str) -> bool:
                    body = {"model": "tiny", "prompt": list(request.prompt_token_ids), "max_tokens": 12,
                            "temperature": 0, "return_token_ids": True}  # fmt: skip
                    headers = {"X-Request-Id": f"{request.request_id}{suffix}"}
                    response = await client.post("/v1/completions", json=body, headers=headers)
                    assert response.status_code == 200, response.text
                    return response.json()["choices"][0]["token_ids"] == expected[request.request_id]

                assert all(await asyncio.gather(*(answer(request, "") for request in requests)))
                slot = slot_of(topic)
                old = await asyncio.to_thread(cluster.kill_master_of, slot)
                answering = asyncio.gather(*(answer(request, "-again") for request in requests))
                await asyncio.to_thread(cluster.wait_for_new_master, slot, old)
                assert all(await answering)
