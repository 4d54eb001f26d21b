"""KVPool: one shared file that its owner writes and nobody else can."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest

from kv_transfer.errors import PoolUnavailable
from kv_transfer.layout import KVLayout, placement_of
from kv_transfer.memory import TRAILER, TRAILER_MAGIC, KVPool, region_offsets
from kv_transfer.placement import packed

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


def test_a_host_without_room_for_the_file_is_a_clear_error_and_leaves_no_descriptor() -> None:
    program = textwrap.dedent("""
        import os, resource
        from kv_transfer import KVLayout, KVPool, PoolUnavailable
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        before = os.listdir("/proc/self/fd")
        try:
            KVPool.allocate(KVLayout("e", "m", "float32", 2, 2, 8, 4, 1000))
        except PoolUnavailable as exc:
            print(exc)
        assert os.listdir("/proc/self/fd") == before
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot allocate a KV pool of 1024000 bytes" in done.stdout
    assert "ask for fewer blocks" in done.stdout


def test_a_pool_of_several_regions_holds_each_from_a_page_boundary_on() -> None:
    order = ("layer", "plane", "block", "token", "head")
    placed = replace(LAYOUT, placement=packed(LAYOUT.shape, order, split=("layer", "plane")))
    with KVPool.allocate(placed) as pool:
        assert [len(region) for region in pool.regions] == [33 * 4 * 2 * 8 * 4] * 4
        for number, region in enumerate(pool.regions):
            region[:] = number + 1
        offsets = region_offsets(placement_of(placed))
        assert [offset % mmap.PAGESIZE for offset in offsets] == [0] * 5
        assert [os.pread(pool.fd, 1, offset)[0] for offset in offsets[:4]] == [1, 2, 3, 4]
        with pytest.raises(ValueError, match="use regions"):
            pool.as_array()
