"""FetchQueue: chunks of bounded size, a bounded number of them, and nobody starves."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.fetch_queue import FetchQueue


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_transfers_take_turns_in_small_helpings_and_who_is_alone_gets_whole_chunks() -> None:
    queue = FetchQueue(units_per_chunk=8, window_chunks=20)
    queue.add(b"a", np.arange(16), np.arange(16))
    queue.add(b"b", np.arange(4), np.arange(4))
    order = []
    while (chunk := queue.next()) is not None:
        order.append((chunk.token, len(chunk.src_ids)))
    assert order == [(b"a", 2), (b"b", 2), (b"a", 2), (b"b", 2), (b"a", 8), (b"a", 4)]


def test_only_so_many_are_under_way_and_dropped_ones_make_room() -> None:
    queue = FetchQueue(units_per_chunk=1, window_chunks=2)
    queue.add(b"a", np.arange(5), np.arange(5))
    queue.add(b"b", ids(9), ids(9))
    first, second = queue.next(), queue.next()
    assert first is not None and second is not None
    assert queue.next() is None
    assert queue.done(first.chunk_id) is first
    assert queue.done(first.chunk_id) is None
    queue.drop(b"b")
    assert queue.done(second.chunk_id) is None
    queue.drop(b"a")
    assert queue.next() is None


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(1, 9)), max_size=12),
)
def test_every_block_is_fetched_once_and_a_transfers_in_order(
    size: int, window: int, pieces: list[tuple[bytes, int]]
) -> None:
    queue = FetchQueue(size, window)
    wanted: dict[bytes, list[int]] = {}
    for number, (token, count) in enumerate(pieces):
        block_ids = np.arange(count) + 100 * number
        queue.add(token, block_ids, block_ids + 7, block_ids[:, None].astype(np.uint64))
        wanted.setdefault(token, []).extend(block_ids.tolist())
    got: dict[bytes, list[int]] = {}
    while True:
        chunks = []
        while (chunk := queue.next()) is not None:
            chunks.append(chunk)
        if not chunks:
            break
        assert len(chunks) <= window
        for chunk in chunks:
            assert len(chunk.src_ids) <= size
            assert (chunk.dst_ids == chunk.src_ids + 7).all()
            assert chunk.sums is not None
            assert (chunk.sums[:, 0] == chunk.src_ids).all()
            got.setdefault(chunk.token, []).extend(chunk.src_ids.tolist())
            assert queue.done(chunk.chunk_id) is chunk
    assert got == wanted
