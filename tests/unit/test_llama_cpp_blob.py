"""Sealed KV: what was truncated, damaged, or is not what follows, does not open."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.llama_cpp.blob import HEADER_BYTES, Progress, Unsealed, beginning, seal, unseal

MODEL, INPUT = "a model", (5, 6, 7, 8, 9)
BEGINNING = beginning(MODEL)
STATE = np.arange(500, dtype=np.uint8)


def sealed(before: Progress = BEGINNING, end: int = 3, padding: int = 0) -> np.ndarray:
    header = seal(STATE, before, before.after(INPUT[before.num_tokens : end]))
    return np.concatenate([np.frombuffer(header, np.uint8), STATE, np.zeros(padding, np.uint8)])


@pytest.mark.parametrize("padding", [0, 1, 4096])
def test_what_was_sealed_opens_whatever_follows_it(padding: int) -> None:
    state, after = unseal(sealed(padding=padding), BEGINNING, INPUT)
    assert (state == STATE).all()
    assert after == BEGINNING.after(INPUT[:3])


def test_pieces_open_one_after_the_other_and_in_no_other_order() -> None:
    middle = BEGINNING.after(INPUT[:3])
    first, second = sealed(), sealed(middle, end=5)
    assert unseal(first, BEGINNING, INPUT)[1] == middle
    assert unseal(second, middle, INPUT)[1].num_tokens == 5
    for data, before in ((second, BEGINNING), (first, middle), (second, middle.after(INPUT[3:]))):
        with pytest.raises(Unsealed, match="is where that of tokens from"):
            unseal(data, before, INPUT)


def test_piece_that_follows_another_beginning_is_refused() -> None:
    """The tokens of the second piece are the same, and its KV is not."""
    second = sealed(BEGINNING.after((1, 2, 3)), end=5)
    with pytest.raises(Unsealed, match="another input or model"):
        unseal(second, BEGINNING.after(INPUT[:3]), INPUT)


def test_piece_that_follows_another_cut_of_the_same_beginning_is_refused() -> None:
    second = sealed(BEGINNING.after(INPUT[:2]).after(INPUT[2:3]), end=5)
    with pytest.raises(Unsealed, match="another input or model"):
        unseal(second, BEGINNING.after(INPUT[:3]), INPUT)


@given(st.integers(0, HEADER_BYTES + len(STATE) - 1), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_noticed(at: int, change: int) -> None:
    damaged = sealed(padding=64)
    damaged[at] ^= change
    with pytest.raises(Unsealed):
        unseal(damaged, BEGINNING, INPUT)


@given(st.integers(0, HEADER_BYTES + len(STATE) - 1))
def test_truncated_one_is_refused(length: int) -> None:
    with pytest.raises(Unsealed):
        unseal(sealed()[:length], BEGINNING, INPUT)


@pytest.mark.parametrize(
    ("model", "tokens"), [("another", INPUT), (MODEL, (5, 6, 8)), (MODEL, (5, 6)), (MODEL, (7, 6, 5)), (MODEL, ())]
)
def test_kv_of_another_input_or_model_is_refused(model: str, tokens: tuple[int, ...]) -> None:
    with pytest.raises(Unsealed, match="another input or model"):
        unseal(sealed(), beginning(model), tokens)


def test_piece_of_no_tokens_is_refused() -> None:
    with pytest.raises(Unsealed):
        unseal(sealed(end=0), BEGINNING, INPUT)


def test_zeroed_memory_is_refused() -> None:
    with pytest.raises(Unsealed, match="does not begin"):
        unseal(np.zeros(1000, np.uint8), BEGINNING, INPUT)
