"""Prefill in one vLLM engine, decode in another: tokens, bytes, damage, unequal ranks, failures."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.vllm.params import LOAD_FAILED, decode_params
from tests.engine_drivers import random_prompt
from tests.vllm.engines import BLOCK_SIZE, Answer, VllmEngine, start

LENGTHS = (5, 17, 31, 32, 33, 40, 63, 64, 65, 96, 100, 127, 128, 129, 150, 200, 256, 300, 333, 400, 500, 512, 640, 700)
PROMPTS = [random_prompt(length) for length in LENGTHS]
NUM_OUTPUT = 24
SEND = {"do_remote_decode": True, "do_remote_prefill": False}


@pytest.fixture(scope="module")
def expected(model: Path) -> list[tuple[int, ...]]:
    """What vLLM makes of each prompt by itself."""
    with VllmEngine(model, connector=False) as engine:
        start(engine)
        return [answer.token_ids for answer in engine.generate(PROMPTS, NUM_OUTPUT)]


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[tuple[VllmEngine, VllmEngine]]:
    with VllmEngine(model) as prefill, VllmEngine(model) as decode:
        start(prefill, decode)
        yield prefill, decode


def prefilled(engine: VllmEngine, prompts: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """What decode is to be given for each."""
    answers = engine.generate(prompts, 1, [dict(SEND) for _ in prompts])
    transfers = [answer.transfer for answer in answers]
    assert all(t is not None and t["do_remote_prefill"] for t in transfers)
    return [t for t in transfers if t is not None]


def test_tokens_equal_those_of_one_engine_and_every_block_arrives_as_it_was(pair, expected):
    prefill, decode = pair
    transfers = prefilled(prefill, PROMPTS)
    answers = decode.generate(PROMPTS, NUM_OUTPUT, transfers)
    assert [a.token_ids for a in answers] == expected
    assert all(len(set(tokens)) > 10 for tokens in expected), "the model says too little to tell KV apart"
    offered, arrived = prefill.blocks(), decode.blocks()
    for prompt, transfer in zip(PROMPTS, transfers, strict=True):
        sums = offered[transfer["transfer_id"]]
        assert {index for _, index in sums} == set(range(-(-len(prompt) // BLOCK_SIZE)))
        assert arrived[transfer["transfer_id"]] == sums


def test_one_damaged_block_of_one_layer_is_seen_in_its_bytes_and_changes_its_requests_tokens(model, expected):
    chosen = slice(15, 17)
    with VllmEngine(model) as prefill, VllmEngine(model) as decode:
        start(prefill, decode)
        transfers = prefilled(prefill, PROMPTS[chosen])
        name = transfers[0]["transfer_id"]
        prefill.damage(name, layer=1, index=2)
        answers = decode.generate(PROMPTS[chosen], NUM_OUTPUT, transfers)
        offered, arrived = prefill.blocks()[name], decode.blocks()[name]
    assert {place for place in offered if arrived[place] != offered[place]} == {(1, 2)}
    assert answers[0].token_ids != expected[chosen][0]
    assert answers[1].token_ids == expected[chosen][1]


def test_what_decode_has_cached_is_not_moved_again(pair, expected):
    prefill, decode = pair
    prompt = random_prompt(300, seed=3)
    decode.generate([prompt], 1)
    (transfer,) = prefilled(prefill, [(*prompt, 9, 8, 7)])
    (answer,) = decode.generate([(*prompt, 9, 8, 7)], NUM_OUTPUT, [transfer])
    (alone,) = prefill.generate([(*prompt, 9, 8, 7)], NUM_OUTPUT)
    assert answer.token_ids == alone.token_ids
    assert {index for _, index in decode.blocks()[transfer["transfer_id"]]} == {9}


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["2-to-1", "1-to-2"])
def test_ranks_may_be_of_unequal_number(model, expected, sizes):
    with VllmEngine(model, tp_size=sizes[0]) as prefill, VllmEngine(model, tp_size=sizes[1]) as decode:
        start(prefill, decode)
        answers = decode.generate(PROMPTS, NUM_OUTPUT, prefilled(prefill, PROMPTS))
    assert [a.token_ids for a in answers] == expected


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_prefill_that_died_costs_a_recomputation_or_an_error(model, expected, policy):
    with VllmEngine(model) as prefill, VllmEngine(model, policy=policy, silence_s=1.0, heartbeat_s=0.3) as decode:
        start(prefill, decode)
        transfers = prefilled(prefill, PROMPTS[-4:])
        prefill.kill()
        answers = decode.generate(PROMPTS[-4:], NUM_OUTPUT, transfers)
        later = decode.generate(PROMPTS[:4], NUM_OUTPUT)
    if policy == "recompute":
        assert [a.token_ids for a in answers] == expected[-4:]
    else:
        assert [a.finish_reason for a in answers] == ["error"] * 4
    assert [a.token_ids for a in later] == expected[:4]


def test_a_prefill_that_is_preempted_takes_its_blocks_back_and_decode_computes(model, expected, tmp_path):
    # They take turns, and then there is room for one of them, whose blocks are kept until decode has them.
    first, second = PROMPTS[-1], PROMPTS[-2]
    tight = {"num_gpu_blocks_override": 33, "long_prefill_token_threshold": 64}
    with VllmEngine(model, engine_args=tight, endpoint_dir=str(tmp_path)) as prefill, VllmEngine(model) as decode:
        start(prefill, decode)
        endpoints = (tmp_path / "rank-0").read_text()
        with ThreadPoolExecutor(1) as thread:
            sent = thread.submit(prefill.generate, [first, second], 1, [{**SEND, "transfer_id": t} for t in "ab"])
            (of_second,) = decode.generate([second], NUM_OUTPUT, [decode_params("b", endpoints, len(second))])
            (of_first,) = decode.generate([first], NUM_OUTPUT, [decode_params("a", endpoints, len(first))])
            answers = sent.result(60)
        (later,) = prefill.generate([first], NUM_OUTPUT)
    assert of_second == Answer(expected[-2], "length", LOAD_FAILED)
    assert of_first == Answer(expected[-1], "length", None)
    assert [a.token_ids for a in answers] == [expected[-1][:1], expected[-2][:1]]
    assert [a.transfer is None for a in answers] == [False, True]
    assert later.token_ids == expected[-1]
