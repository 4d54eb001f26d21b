"""Sealed KV: what was truncated, damaged or is of something else does not open."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.llama_cpp.blob import HEADER_BYTES, Unsealed, digest_of, seal, unseal

MODEL, INPUT = "a model", (5, 6, 7)
DIGEST = digest_of(MODEL, INPUT)
STATE = np.arange(500, dtype=np.uint8)


def sealed(padding: int = 0) -> np.ndarray:
    header = np.frombuffer(seal(STATE, DIGEST, len(INPUT)), np.uint8)
    return np.concatenate([header, STATE, np.zeros(padding, np.uint8)])


@pytest.mark.parametrize("padding", [0, 1, 4096])
def test_what_was_sealed_opens_whatever_follows_it(padding: int) -> None:
    assert (unseal(sealed(padding), DIGEST, len(INPUT)) == STATE).all()


@given(st.integers(0, HEADER_BYTES + len(STATE) - 1), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_noticed(at: int, change: int) -> None:
    damaged = sealed(64)
    damaged[at] ^= change
    with pytest.raises(Unsealed):
        unseal(damaged, DIGEST, len(INPUT))


@given(st.integers(0, HEADER_BYTES + len(STATE) - 1))
def test_truncated_one_is_refused(length: int) -> None:
    with pytest.raises(Unsealed):
        unseal(sealed()[:length], DIGEST, len(INPUT))


@pytest.mark.parametrize(
    ("model", "tokens"), [("another", INPUT), (MODEL, (5, 6, 8)), (MODEL, (5, 6)), (MODEL, (7, 6, 5))]
)
def test_kv_of_another_input_or_model_is_refused(model: str, tokens: tuple[int, ...]) -> None:
    with pytest.raises(Unsealed, match="another input or model"):
        unseal(sealed(), digest_of(model, tokens), len(tokens))


def test_zeroed_memory_is_refused() -> None:
    with pytest.raises(Unsealed, match="does not begin"):
        unseal(np.zeros(1000, np.uint8), DIGEST, len(INPUT))
