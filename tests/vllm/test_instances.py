"""vLLM instances under this scheduler: tokens, the OpenAI API, and instances that are killed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.demo.fleet import Fleet, Member
from splitwise_sched.types import Request, SamplingParams
from tests.e2e.killing import kill_one_under_load
from tests.e2e.reference import generate
from tests.engine_drivers import random_prompt
from tests.vllm.serving import PATIENCE

FLAGS = (
    "--engine", "vllm", "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "1024",
    "--max-num-batched-tokens", "128", "--engine-args", '{"enforce_eager": true}', "--drain-timeout-s", "5", *PATIENCE,
)  # fmt: skip
READY_S = 300.0
LENGTHS = (5, 31, 32, 33, 64, 100, 129, 200, 300, 400, 512, 700)
NUM_OUTPUT = 200


def request_of(index: int, length: int) -> Request:
    sampling = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True)
    return Request(f"r{index}", "tiny", random_prompt(length, seed=index), sampling)


REQUESTS = [request_of(i, length) for i, length in enumerate((*LENGTHS, *LENGTHS))]


def start_instance(fleet: Fleet, role: str, index: int, model: Path, *more: str) -> Member:
    name = f"{role}-{index}"
    return fleet.start(
        name, ("serve", "--model", str(model), "--splitwise-role", role, "--instance-name", name, *FLAGS, *more)
    )


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    """By transformers: the engines are to agree."""
    return generate(model, REQUESTS)


@pytest.fixture
def fleet(model: Path) -> Iterator[Fleet]:
    with Fleet() as fleet:
        for role in ("prefill", "decode"):
            for index in range(2):
                start_instance(fleet, role, index, model)
        yield fleet


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_a_killed_instance_costs_no_request_and_no_token(fleet, expected, victim):
    await fleet.wait_for_instances(4, READY_S)
    # Decode waits for no KV of the dead: it computes the prompt. What was not bound to one yet is run again.
    was_hit = lambda record: int(record["attempts"]) > 1 or "kv_load_failed" in record  # noqa: E731
    await kill_one_under_load(fleet, REQUESTS, victim, expected, was_hit)


async def test_the_openai_api_gives_the_same_text_and_a_terminated_instance_finishes_what_it_holds(
    fleet, model, expected
):
    import openai

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fleet.start("gateway", ("gateway", "--port", str(port)))
    await fleet.wait_for_instances(4, READY_S)
    await fleet.wait_for_gateway(port)
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    async def ask(request: Request) -> list[int]:
        tokens: list[int] = []
        stream = await client.completions.create(
            model="tiny", prompt=list(request.prompt_token_ids), max_tokens=NUM_OUTPUT, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        async for chunk in stream:
            for choice in chunk.choices:
                tokens += getattr(choice, "token_ids", None) or []
        return tokens

    answers = [asyncio.create_task(ask(r)) for r in REQUESTS]
    await asyncio.sleep(0.3)
    leaving = [fleet.members.pop(name).process for name in ("prefill-1", "decode-1")]
    for process in leaving:
        process.terminate()
    got = await asyncio.wait_for(asyncio.gather(*answers), 180)
    assert {r.request_id: a for r, a in zip(REQUESTS, got, strict=True)} == expected
    for process in leaving:
        assert await asyncio.to_thread(process.wait, 60) == 0
    await client.close()
