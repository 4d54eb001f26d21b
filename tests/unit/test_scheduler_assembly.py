"""Outputs of one request, however they come, reach its user once and in order."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from splitwise_sched.assembly import Assembly
from splitwise_sched.types import FinishReason, Output, TokenLogprob


def out(index: int, *tokens: int, epoch: int = 1, finish: FinishReason | None = None) -> Output:
    return Output("r", epoch, index, tokens, tuple(TokenLogprob(t, -1.0) for t in tokens), finish)


def tokens_of(outputs: list[Output]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def test_repeated_tokens_are_given_once_with_their_own_logprobs():
    assembly = Assembly()
    assert tokens_of(assembly.feed(out(0, 5))) == [5]
    fresh = assembly.feed(out(0, 5, 6))
    assert tokens_of(fresh) == [6] and fresh[0].index == 1 and [p.token_id for p in fresh[0].logprobs] == [6]
    assert assembly.feed(out(0, 5, 6)) == []


def test_output_that_comes_early_waits_for_what_is_before_it():
    assembly = Assembly()
    assert assembly.feed(out(2, 7, finish=FinishReason.STOP)) == []
    assert not assembly.ended
    assert tokens_of(assembly.feed(out(0, 5, 6))) == [5, 6, 7]
    assert assembly.ended


def test_what_comes_under_a_lower_epoch_is_stale():
    assembly = Assembly()
    assembly.feed(out(0, 5))
    assert tokens_of(assembly.feed(out(1, 60, epoch=2))) == [60]
    assert assembly.feed(out(1, 6)) == [] and assembly.feed(out(2, 7, finish=FinishReason.STOP)) == []
    assert assembly.token_ids == [5, 60] and not assembly.ended


def test_early_outputs_of_a_lost_run_are_forgotten():
    assembly = Assembly()
    assembly.feed(out(1, 6))
    assert assembly.raise_epoch(2)
    assert tokens_of(assembly.feed(out(0, 50, epoch=2))) == [50]
    assert not assembly.raise_epoch(1)


def test_nothing_comes_after_the_end():
    assembly = Assembly()
    assert assembly.feed(out(0, finish=FinishReason.ERROR))[0].finish_reason is FinishReason.ERROR
    assert assembly.feed(out(0, 5)) == [] and assembly.feed(out(0, 5, epoch=9)) == []


@given(st.data())
def test_any_order_with_repetitions_gives_the_same_stream(data):
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=20))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=5)) | {0, len(tokens)})
    pieces = [out(a, *tokens[a:b]) for a, b in itertools.pairwise(cuts)]
    pieces[-1] = replace(pieces[-1], finish_reason=FinishReason.LENGTH)
    stream = data.draw(st.permutations(pieces + data.draw(st.lists(st.sampled_from(pieces), max_size=5))))
    assembly = Assembly()
    given_out = [o for piece in stream for o in assembly.feed(piece)]
    assert tokens_of(given_out) == tokens == assembly.token_ids
    assert [o.finish_reason for o in given_out][-1] is FinishReason.LENGTH
    assert [o.finish_reason for o in given_out].count(FinishReason.LENGTH) == 1
