"""Plain ``vllm serve`` with the connector, behind a proxy that only passes ``kv_transfer_params`` on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from splitwise_sched.embedded import die_with_parent
from splitwise_sched.types import Request, SamplingParams
from tests.e2e.reference import generate
from tests.engine_drivers import random_prompt
from tests.vllm.engines import BLOCK_SIZE

READY_S = 300.0
NUM_OUTPUT = 24
LENGTHS = (5, 31, 32, 33, 64, 100, 129, 200, 300, 400, 512, 700) * 2
REQUESTS = [
    Request(f"r{i}", "tiny", random_prompt(n, seed=i), SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0))
    for i, n in enumerate(LENGTHS)
]


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    return generate(model, REQUESTS)


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Base URLs of a prefill and a decode server."""
    config = {
        "kv_connector": "SplitwiseConnector",
        "kv_connector_module_path": "engine.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"protocols": "tcp", "checksum": "crc32"},
    }
    flags = (
        "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_SIZE),
        "--max-model-len", "1024", "--max-num-batched-tokens", "128", "--kv-transfer-config", json.dumps(config),
    )  # fmt: skip
    logs, processes, urls = tmp_path_factory.mktemp("logs"), [], []
    try:
        for name in ("prefill", "decode"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            command = [sys.executable, die_with_parent.__file__, str(os.getpid()), sys.executable, "-m",
                       "tests.vllm.vllm_cli", "serve", str(model), "--port", str(port), *flags]  # fmt: skip
            with (logs / name).open("wb") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
            urls.append(f"http://127.0.0.1:{port}")
        for url, process, name in zip(urls, processes, ("prefill", "decode"), strict=True):
            wait_ready(url, process, logs / name)
        yield urls
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not yet
        time.sleep(0.5)
    pytest.fail(f"vllm serve did not come up: {log.read_text(errors='replace')[-2000:]}")


def test_a_proxy_that_passes_the_parameters_on_gets_the_tokens_of_one_engine(servers, expected):
    prefill, decode = (openai.OpenAI(base_url=f"{url}/v1", api_key="none") for url in servers)

    def ask(client: openai.OpenAI, request: Request, max_tokens: int, transfer: dict[str, Any]) -> Any:
        return client.completions.create(
            model="tiny", prompt=list(request.prompt_token_ids), max_tokens=max_tokens, temperature=0, timeout=120,
            extra_body={"ignore_eos": True, "return_token_ids": True, "kv_transfer_params": transfer},
        )  # fmt: skip

    def through_both(request: Request) -> list[int]:
        first = ask(prefill, request, 1, {"do_remote_decode": True, "do_remote_prefill": False})
        transfer = first.kv_transfer_params
        assert transfer["remote_num_tokens"] == len(request.prompt_token_ids)
        answer = ask(decode, request, NUM_OUTPUT, transfer)
        assert list(first.choices[0].token_ids) == list(answer.choices[0].token_ids)[:1]
        return list(answer.choices[0].token_ids)

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(through_both, REQUESTS))
    assert {r.request_id: tokens for r, tokens in zip(REQUESTS, got, strict=True)} == expected
    # What decode was given came over the wire, and was not computed there.
    metrics = httpx.get(f"{servers[1]}/metrics", timeout=10).text
    external = [line for line in metrics.splitlines() if line.startswith("vllm:external_prefix_cache_hits_total")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in external) > 0.9 * sum(LENGTHS), external
