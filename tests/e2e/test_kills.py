"""Instances in processes of their own; one is killed under load, and every user still gets the right tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.demo.fleet import Fleet
from engine.testing import make_tiny_model
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.types import Request, SamplingParams
from tests.e2e.killing import kill_one_under_load, start_two_pairs
from tests.e2e.reference import generate
from tests.engine_drivers import random_prompt
from tests.integration.toy import tokens_of, until

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


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_killed_instance_costs_no_request_and_no_token(model, expected, victim):
    with Fleet() as fleet:
        await start_two_pairs(fleet, model, FLAGS)
        await kill_one_under_load(fleet, REQUESTS, victim, expected)


async def test_terminated_instance_finishes_what_it_holds_and_ends(model, expected):
    with Fleet() as fleet:
        await start_two_pairs(fleet, model, FLAGS)
        async with FrontEnd(fleet.settings) as frontend:
            streams = [await frontend.submit(r) for r in REQUESTS]
            answers = [asyncio.create_task(tokens_of(s, 180)) for s in streams]
            await until(lambda: any(len(s.assembly.token_ids) > 5 for s in streams), 60)
            leaving = [fleet.members.pop(name).process for name in ("prefill-0", "decode-0")]
            for process in leaving:
                process.terminate()
            got = await asyncio.gather(*answers)
            records = [await frontend.request_record(r.request_id) for r in REQUESTS]
            for process in leaving:
                assert await asyncio.to_thread(process.wait, 30) == 0
        fleet.check()
    assert {r.request_id: a for r, a in zip(REQUESTS, got, strict=True)} == expected
    assert {r["attempts"] for r in records} == {"1"}
