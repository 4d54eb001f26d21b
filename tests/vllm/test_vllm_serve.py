"""Plain ``vllm serve`` with the connector, behind a proxy that only passes ``kv_transfer_params`` on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from splitwise_sched.types import Request, SamplingParams
from tests.e2e.reference import generate
from tests.engine_drivers import random_prompt
from tests.sharing import Shared
from tests.vllm.serving import VllmServe
from tests.vllm.survivors import survivors

NUM_OUTPUT = 24
LENGTHS = (5, 31, 32, 33, 64, 100, 129, 200, 300, 400, 512, 700) * 2
REQUESTS = [
    Request(f"r{i}", "tiny", random_prompt(n, seed=i), SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0))
    for i, n in enumerate(LENGTHS)
]


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    return generate(model, REQUESTS)


@contextmanager
def serving(model: Path, logs: Path) -> Iterator[list[VllmServe]]:
    """For prefill and for decode."""
    with ExitStack() as stack:
        found = [stack.enter_context(closing(VllmServe(name, model, logs))) for name in ("prefill", "decode")]
        for server in found:
            server.wait_ready()
        yield found


@pytest.fixture(scope="module")
def all_servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared[list[VllmServe]]]:
    with Shared(lambda: serving(model, tmp_path_factory.mktemp("logs"))) as shared:
        yield shared


@pytest.fixture
def servers(all_servers: Shared[list[VllmServe]], request: pytest.FixtureRequest) -> Iterator[list[VllmServe]]:
    yield from all_servers.lend(request)


def test_a_proxy_that_passes_the_parameters_on_gets_the_tokens_of_one_engine(servers, expected):
    prefill, decode = (openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") for server in servers)

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
    assert servers[1].metric("vllm:external_prefix_cache_hits_total") > 0.9 * sum(LENGTHS)


def test_nothing_of_a_killed_server_is_left_where_it_was_asked_for(servers):
    """The last test here: the server is gone after it."""
    below = servers[1].kill_main()
    assert len(below) >= 2, below
    assert not survivors(below)
