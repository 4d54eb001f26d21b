"""Which waiting requests an engine takes, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_sched.fastdeploy.admission import ChunkedPrefill, Offer, num_admitted


def offer(blocks: int = 100, reserved: int = 2, tokens: int = 1000, batch: int = 8, chunked=None) -> Offer:
    return Offer(blocks, 16, reserved, tokens, batch, chunked)


@pytest.mark.parametrize(
    ("why", "lengths", "given", "admitted"),
    [
        ("nothing waits", [], offer(), 0),
        ("all fit", [16, 16, 16], offer(), 3),
        ("batch is the limit", [16] * 10, offer(batch=4), 4),
        ("no batch", [16], offer(batch=0), 0),
        ("no block beside those for output", [1], offer(blocks=2), 0),
        ("blocks are the limit: (1 + 2) + (1 + 2)", [16, 16, 16], offer(blocks=8), 2),
        ("blocks to the last", [16, 16, 16], offer(blocks=9), 3),
        ("a token more takes a block more", [16, 17, 16], offer(blocks=9), 2),
        ("a prompt without blocks holds back all behind it", [16, 640, 1], offer(blocks=20), 1),
        ("a prompt without blocks is not admitted, even alone", [640], offer(blocks=20), 0),
        ("tokens are the limit", [400, 400, 400], offer(tokens=1000), 2),
        ("tokens to the last", [500, 500, 1], offer(tokens=1000), 2),
        ("a prompt beyond the token cap is admitted alone", [1500, 1], offer(blocks=200, tokens=1000), 1),
        ("a prompt beyond the token cap is not admitted behind another", [1, 1500], offer(blocks=200, tokens=1000), 1),
        (
            "chunks: the token cap is not looked at",
            [400] * 4,
            offer(200, tokens=1, chunked=ChunkedPrefill(9, 9, 100)),
            4,
        ),
        ("chunks: prompts are the limit", [10] * 9, offer(chunked=ChunkedPrefill(3, 9, 100)), 3),
        ("chunks: long prompts are the limit", [10, 200, 10, 200], offer(chunked=ChunkedPrefill(9, 1, 100)), 3),
        ("chunks: at the threshold is not long", [100, 100, 100], offer(chunked=ChunkedPrefill(9, 1, 100)), 3),
        ("chunks: long and short count together", [200, 10, 10], offer(chunked=ChunkedPrefill(2, 2, 100)), 2),
        ("chunks: one alone is admitted", [500], offer(chunked=ChunkedPrefill(1, 1, 100)), 1),
    ],
)
def test_admission(why, lengths, given, admitted):
    assert num_admitted(lengths, given) == admitted, why


chunked_prefills = st.none() | st.builds(ChunkedPrefill, *[st.integers(1, 20)] * 2, st.integers(1, 100))
offers = st.builds(
    Offer, st.integers(0, 200), st.integers(1, 64), st.integers(0, 8), st.integers(1, 500), st.integers(0, 10),
    chunked_prefills,
)  # fmt: skip


@given(st.lists(st.integers(1, 300), max_size=12), offers)
def test_what_is_admitted_fits_and_more_room_never_admits_less(lengths, given):
    count = num_admitted(lengths, given)
    blocks = sum(-(-n // given.block_size) + given.reserved_output_blocks for n in lengths[:count])
    assert count <= given.batch and blocks <= given.available_blocks
    more = Offer(given.available_blocks + 5, given.block_size, given.reserved_output_blocks,
                 given.max_num_batched_tokens + 50, given.batch + 1, given.chunked_prefill)  # fmt: skip
    assert num_admitted(lengths, more) >= count
