"""KVPool: one shared file that its owner writes and nobody else can."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from kv_transfer.errors import PoolUnavailable
from kv_transfer.layout import KVLayout, placement_of
from kv_transfer.memory import TRAILER, TRAILER_MAGIC, KVPool, region_offsets

LAYOUT = KVLayout("transformers", "m", "float32", 2, 2, 8, 4, 33)


def test_views_share_the_memory_of_the_file() -> None:
    with KVPool.allocate(LAYOUT) as pool:
        pool.block_view(5, 1)[:] = 7
        assert pool.as_array().sum() == 7 * LAYOUT.layer_block_bytes
        offset = 5 * LAYOUT.block_bytes + LAYOUT.layer_block_bytes
        assert os.pread(pool.fd, LAYOUT.layer_block_bytes, offset) == b"\x07" * LAYOUT.layer_block_bytes


def test_the_trailer_names_the_pool() -> None:
    with KVPool.allocate(LAYOUT) as pool:
        text = os.pread(pool.fd, TRAILER.size, region_offsets(placement_of(LAYOUT))[-1])
        assert TRAILER.unpack(text) == (TRAILER_MAGIC, pool.nonce, LAYOUT.pool_bytes)


def test_nobody_who_opens_the_file_can_write_or_resize_it() -> None:
    with KVPool.allocate(LAYOUT) as pool:
        fd = os.open(f"/proc/self/fd/{pool.fd}", os.O_RDWR)
        try:
            with pytest.raises(OSError):
                mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(OSError):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(OSError):
                os.ftruncate(fd, 0)
            with mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as view:
                pool.as_array()[0, 0] = 9
                assert view[0] == 9
        finally:
            os.close(fd)


def test_close_is_idempotent_and_leaves_an_engines_view_alive() -> None:
    pool = KVPool.allocate(LAYOUT)
    view = pool.as_array()
    pool.close()
    pool.close()
    view[3] = 1
    assert int(view[3].sum()) == LAYOUT.block_bytes
    with pytest.raises(ValueError, match="closed"):
        _ = pool.buffer


def test_blocks_outside_the_pool_are_refused() -> None:
    with KVPool.allocate(LAYOUT) as pool, pytest.raises(IndexError, match="block 33"):
        pool.block_view(33, 0)


def test_more_memory_than_the_host_has_is_a_clear_error() -> None:
    huge = KVLayout("transformers", "m", "float32", 64, 64, 128, 64, 100_000)
    with pytest.raises(PoolUnavailable, match="fewer blocks"):
        KVPool.allocate(huge)


def test_a_new_pool_is_zeroed() -> None:
    with KVPool.allocate(LAYOUT, populate=False) as pool:
        assert not np.any(pool.as_array())
