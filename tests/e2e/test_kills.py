"""Instances in processes of their own; one is killed under load, and every user still gets the right tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.demo.fleet import Fleet
from engine.testing import make_tiny_model
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.types import Request, SamplingParams
from tests.e2e.reference import generate
from tests.engine_drivers import random_prompt

FLAGS = ("--served-model-name", "tiny", "--num-gpu-blocks-override", "900", "--max-num-batched-tokens", "64")
NUM_OUTPUT = 150


def request_of(request_id: str, length: int) -> Request:
    sampling = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True)
    return Request(request_id, "tiny", random_prompt(length, seed=len(request_id)), sampling)


LENGTHS = (1, 5, 17, 40, 64, 100, 200, 333, 600, 900, 1200, 1500)
REQUESTS = [request_of(f"r{i}", length) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    return generate(model, REQUESTS)


async def first(condition: Callable[[], Awaitable[str | None]]) -> str:
    """The first thing that ``condition`` gives; it looks at other processes, so there is nothing to await."""

    async def poll() -> str:
        while (found := await condition()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return found

    return await asyncio.wait_for(poll(), 60)


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_killed_instance_costs_no_request_and_no_token(model, expected, victim):
    with Fleet() as fleet:
        for role in ("prefill", "decode"):
            for index in range(2):
                fleet.start_instance(role, index, model, FLAGS)
        await fleet.wait_for_instances(4)
        async with FrontEnd(fleet.settings) as frontend:
            streams = [await frontend.submit(r) for r in REQUESTS]
            answers = [asyncio.create_task(tokens_of(s)) for s in streams]

            async def held() -> str | None:
                """The instance that a request is on at this moment, when it is of the victim's role."""
                for stream in streams:
                    under_way = victim == "prefill" or 10 < len(stream.assembly.token_ids) < NUM_OUTPUT // 2
                    record = await frontend.request_record(stream.request_id)
                    if under_way and record.get("state") == victim:
                        return record[victim]
                return None

            instance_id = await first(held)
            member = fleet.members.pop(instance_id.rpartition("-")[0])
            member.process.kill()
            got = await asyncio.wait_for(asyncio.gather(*answers), 120)
            records = [await frontend.request_record(r.request_id) for r in REQUESTS]
        fleet.check()
    assert {r.request_id: a for r, a in zip(REQUESTS, got, strict=True)} == expected
    rerun = [r for r in records if int(r["attempts"]) > 1]
    name = instance_id.rpartition("-")[0]
    assert rerun and all(name in r["history"] for r in rerun), [r.get("history") for r in rerun]
    assert {r["state"] for r in records} == {"done"}


async def test_terminated_instance_finishes_what_it_holds_and_ends(model, expected):
    with Fleet() as fleet:
        for name in ("prefill", "decode"):
            for index in range(2):
                fleet.start_instance(name, index, model, FLAGS)
        await fleet.wait_for_instances(4)
        async with FrontEnd(fleet.settings) as frontend:
            streams = [await frontend.submit(r) for r in REQUESTS]
            answers = [asyncio.create_task(tokens_of(s)) for s in streams]

            async def some_tokens() -> str | None:
                return "yes" if any(len(s.assembly.token_ids) > 5 for s in streams) else None

            await first(some_tokens)
            leaving = [fleet.members.pop(name).process for name in ("prefill-0", "decode-0")]
            for process in leaving:
                process.terminate()
            got = await asyncio.wait_for(asyncio.gather(*answers), 120)
            records = [await frontend.request_record(r.request_id) for r in REQUESTS]
            for process in leaving:
                assert await asyncio.to_thread(process.wait, 30) == 0
        fleet.check()
    assert {r.request_id: a for r, a in zip(REQUESTS, got, strict=True)} == expected
    assert {r["attempts"] for r in records} == {"1"}


async def tokens_of(stream: OutputStream) -> list[int]:
    return [token for output in [o async for o in stream] for token in output.token_ids]
