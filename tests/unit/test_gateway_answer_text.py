"""From output tokens to what is shown: any cut of any answer, with stop strings and logprobs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitwise_sched.gateway.answer_text import AnswerText, Piece
from splitwise_sched.gateway.answers import token_label
from splitwise_sched.tokenizer import StopMatcher, Tokenizer
from splitwise_sched.types import FinishReason, Output, TokenLogprob
from tests.tokenizer_dirs import byte_level, saved


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained_dir(saved(tmp_path_factory.mktemp("model"), byte_level()))


def cut(ids: list[int], sizes: list[int], finish: FinishReason) -> list[Output]:
    outputs, start = [], 0
    for size in [*sizes, len(ids)]:
        part = tuple(ids[start : start + size])
        logprobs = tuple(TokenLogprob(id_, -1.0) for id_ in part)
        outputs.append(Output("r", 1, start, part, logprobs))
        start += len(part)
    return [*outputs, Output("r", 1, start, finish_reason=finish)]


def run(answer: AnswerText, outputs: list[Output]) -> list[Piece]:
    pieces = []
    for output in outputs:
        pieces.append(answer.feed(output))
        if pieces[-1].finish_reason is not None:
            break
    return pieces


@settings(max_examples=300)
@given(
    ids=st.lists(st.integers(0, 399), max_size=30),
    sizes=st.lists(st.integers(0, 5), max_size=10),
    stops=st.lists(st.text(alphabet="the qu", min_size=1, max_size=3), max_size=3),
)
def test_any_cut_of_an_answer_shows_the_same(
    ids: list[int], sizes: list[int], stops: list[str], tokenizer: Tokenizer
) -> None:
    matcher = StopMatcher(stops)
    expected = matcher.feed(tokenizer.decode(ids)) + matcher.flush()
    pieces = run(AnswerText(tokenizer, stops), cut(ids, sizes, FinishReason.LENGTH))
    text = "".join(piece.text for piece in pieces)
    assert text == expected
    assert pieces[-1].finish_reason is (FinishReason.STOP if matcher.matched else FinishReason.LENGTH)
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.logprob.token_id for token in tokens] == ids[: len(tokens)]
    assert [token.offset for token in tokens] == sorted(token.offset for token in tokens)
    if matcher.matched is None:
        assert len(tokens) == len(ids)
    else:
        assert all(token.offset < len(text) for token in tokens)


def test_tokens_come_with_the_text_that_they_begin(tokenizer: Tokenizer) -> None:
    answer = AnswerText(tokenizer, ["fox"])
    shown, tokens = "", 0
    for output in cut(tokenizer.encode("the fo"), [1] * 10, FinishReason.LENGTH):
        piece = answer.feed(output)
        shown += piece.text
        tokens += len(piece.tokens)
        if piece.finish_reason is None:
            assert not shown.endswith("f")
            assert all(token.offset < len(shown) for token in piece.tokens)
    assert shown == "the fo"
    assert tokens == answer.num_tokens == len(tokenizer.encode("the fo"))


def test_half_a_character_at_the_end_is_marked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the 🚀")[:-1]
    pieces = run(AnswerText(tokenizer, []), cut(ids, [1] * len(ids), FinishReason.LENGTH))
    assert "".join(piece.text for piece in pieces) == "the \ufffd"
    assert not any("\ufffd" in piece.text for piece in pieces[:-1])


@pytest.mark.parametrize("finish", [FinishReason.STOP, FinishReason.LENGTH])
def test_a_token_that_ends_the_answer_is_no_part_of_it(finish: FinishReason, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the f")
    answer = AnswerText(tokenizer, [], ending_ids=[ids[-1]])
    piece = answer.feed(Output("r", 1, 0, tuple(ids), finish_reason=finish))
    assert piece.text == tokenizer.decode(ids[:-1] if finish is FinishReason.STOP else ids)
    assert answer.num_tokens == len(ids)


def test_a_token_that_is_no_text_is_labelled_by_its_bytes() -> None:
    assert token_label("é".encode()) == "é"
    assert token_label("é".encode()[:1]) == "bytes:\\xc3"
