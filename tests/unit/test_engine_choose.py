"""The sampler without torch draws what the one with torch draws."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from engine.batching.draws import Draw
from engine.batching.sampler import choose
from engine.transformers.sampler import sample
from splitwise_sched.types import SamplingParams

PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1e-20},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 2.0, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1e-9},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_both_samplers_choose_the_same_tokens_with_the_same_logprobs(params: dict[str, float]) -> None:
    generator = np.random.default_rng(7)
    for seed in range(60):
        row = 3 * generator.standard_normal(700, dtype=np.float32)
        draw = Draw(SamplingParams(logprobs=5, **params), seed, seed % 11)
        ours, (theirs,) = choose(row, draw), sample(torch.from_numpy(row.copy()).unsqueeze(0), [draw])
        assert ours is not None and theirs is not None
        assert ours.token_id == theirs.token_id
        assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-4)
        assert [t for t, _ in ours.logprob.top] == [t for t, _ in theirs.logprob.top]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_drawn_from_what_is_no_number(bad: float) -> None:
    row = np.zeros(10, np.float32)
    row[3] = bad
    assert choose(row, Draw(SamplingParams(temperature=0.7), 1, 0)) is None
    assert choose(np.full(10, -np.inf, np.float32), Draw(SamplingParams(temperature=0.0), 1, 0)) is None


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    row = np.full(50, -np.inf, np.float32)
    row[[7, 20]] = 0.0
    drawn = {choose(row, Draw(SamplingParams(temperature=1.0), seed, 0)).token_id for seed in range(100)}
    assert drawn == {7, 20}
