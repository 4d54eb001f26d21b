"""Sampling against direct computation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from engine.batching.draws import Draw, Sampled, seed_of, uniform  # noqa: E402
from engine.transformers import sampler  # noqa: E402
from engine.transformers.sampler import sample  # noqa: E402
from splitwise_sched.types import SamplingParams  # noqa: E402

VOCAB_SIZE = 400


def logits_for(seed: int, num_rows: int = 1, vocab_size: int = VOCAB_SIZE) -> Any:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def draw(seed: int = 0, position: int = 0, **sampling: Any) -> Draw:
    return Draw(SamplingParams(**sampling), seed, position)


def choose(logits: Any, draws: list[Draw]) -> list[int]:
    chosen = sample(logits, draws)
    assert all(isinstance(choice, Sampled) for choice in chosen)
    return [choice.token_id for choice in chosen if choice is not None]


def allowed_tokens(row: Any, top_k: int, top_p: float, temperature: float) -> Any:
    """Probabilities after temperature, top-k and top-p, as their definitions say, by sorting."""
    order = row.argsort(descending=True, stable=True)
    scaled = row.double() / temperature
    if top_k:
        scaled[order[top_k:]] = float("-inf")
    probs = scaled.softmax(-1)
    kept, mass = [], 0.0
    for token_id in order.tolist():
        if kept and mass >= top_p:
            break
        kept.append(token_id)
        mass += probs[token_id].item()
    result = torch.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


def test_greedy_takes_the_most_likely_token() -> None:
    logits = logits_for(1, num_rows=5)
    assert choose(logits, [draw(temperature=0.0)] * 5) == logits.argmax(-1).tolist()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000),
    st.integers(0, VOCAB_SIZE),
    st.sampled_from([0.05, 0.3, 0.7, 0.95, 0.999, 1.0]),
    st.sampled_from([0.2, 1.0, 3.0]),
)
def test_a_draw_is_the_inverse_of_the_filtered_distribution(
    seed: int, top_k: int, top_p: float, temperature: float
) -> None:
    logits = logits_for(seed)
    probs = allowed_tokens(logits[0], top_k, top_p, temperature)
    for position in range(4):
        u = uniform(seed, position)
        (token_id,) = choose(logits, [draw(seed, position, temperature=temperature, top_p=top_p, top_k=top_k)])
        assert probs[token_id] > 0
        before = probs[:token_id].sum().item()
        assert before - 1e-5 <= u <= before + probs[token_id].item() + 1e-5


def test_nucleus_wider_than_the_first_look_is_found_all_the_same() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 4000:] = -50.0
    tokens = {choose(logits, [draw(0, i, temperature=1.0, top_p=0.999)])[0] for i in range(2000)}
    assert max(tokens) < 4000
    assert len(tokens) > 1000


@pytest.mark.parametrize(("u", "expected"), [(0.0, 3), (1 - 2**-53, 6)])
def test_token_of_probability_zero_is_not_drawn_at_either_end(
    monkeypatch: pytest.MonkeyPatch, u: float, expected: int
) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: u)
    logits = torch.full((1, 10), float("-inf"))
    logits[0, 3:7] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert choose(logits, [draw(temperature=1.0)]) == [expected]


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    num_draws = 4000
    counts = Counter(choose(logits.expand(num_draws, -1), [draw(7, i, temperature=1.0) for i in range(num_draws)]))
    for token_id, probability in enumerate(logits[0].softmax(-1).tolist()):
        assert counts[token_id] / num_draws == pytest.approx(probability, abs=0.03)


def test_a_position_draws_the_same_whatever_else_is_in_the_batch() -> None:
    logits = logits_for(3, num_rows=6)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_k": 40, "top_p": 0.5},
        {"temperature": 1e-3},
    ]
    draws = [draw(11, row, **kind) for row, kind in enumerate(kinds)]
    alone = [choose(logits[row : row + 1], [draws[row]])[0] for row in range(6)]
    assert choose(logits, draws) == alone
    assert choose(logits.flip(0), draws[::-1]) == alone[::-1]


def test_seed_and_position_both_change_the_draw() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    tokens = {choose(logits, [draw(seed, position, temperature=1.0)])[0] for seed in range(6) for position in range(6)}
    assert len(tokens) > 25


def test_request_without_a_seed_has_one_of_its_id() -> None:
    sampling = SamplingParams()
    assert seed_of(sampling, "a") == seed_of(sampling, "a") != seed_of(sampling, "b")
    assert seed_of(SamplingParams(seed=-5), "a") == -5


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-30, 1.0, 100.0])
def test_extreme_temperatures_still_give_a_token_that_the_model_allows(temperature: float) -> None:
    logits = torch.full((1, 50), float("-inf"))
    logits[0, 7], logits[0, 9] = 80.0, 79.0
    assert set(choose(logits, [draw(1, 0, temperature=temperature)])) <= {7, 9}


def test_logprobs_are_those_of_the_model_before_temperature() -> None:
    logits = logits_for(5, num_rows=3)
    expected = logits.log_softmax(-1)
    draws = [
        draw(temperature=2.0, logprobs=4),
        draw(temperature=0.0),
        draw(temperature=0.0, logprobs=0),
    ]
    first, second, third = sample(logits, draws)
    assert first and second and third
    assert second.logprob is None
    assert first.logprob is not None and third.logprob is not None
    assert first.logprob.logprob == pytest.approx(expected[0, first.token_id].item(), abs=1e-5)
    values, indices = expected[0].topk(4)
    assert [token_id for token_id, _ in first.logprob.top] == indices.tolist()
    assert [logprob for _, logprob in first.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert third.logprob.top == ()
    assert third.logprob.logprob == pytest.approx(expected[2].max().item(), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_without_a_finite_maximum_gives_no_token_and_spares_the_others(bad: float) -> None:
    logits = logits_for(9, num_rows=3)
    expected = choose(logits, [draw(2, i, temperature=1.0, top_p=0.9) for i in range(3)])
    logits[1, 5] = bad
    first, second, third = sample(logits, [draw(2, i, temperature=1.0, top_p=0.9) for i in range(3)])
    assert first and third
    assert [first.token_id, third.token_id] == [expected[0], expected[2]]
    assert second is None
