"""From plans to kernel arguments: what the kernel would touch, against an oracle that knows nothing of plans."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.pairing import source_ranks
from kv_transfer.plan import plan_pair, units_of
from kv_transfer.transports.cuda_ipc import geometry, kernel
from kv_transfer.transports.cuda_ipc.geometry import Family, Packing, UnitStep, families, mean_stretch_bytes, stretches
from kv_transfer.transports.cuda_ipc.kernel import Divisor, Launch
from tests import kv_oracle
from tests.cuda_kernel_twin import locate, quotient
from tests.kv_layouts import Pair, pairs


class Arena:
    """Memories side by side in one array: addresses are positions in it, the first one no multiple of anything."""

    def __init__(self, *memories: kv_oracle.Memory) -> None:
        self.bases: list[list[int]] = []
        pieces = [np.zeros(16, np.uint8)]
        at = 16
        for memory in memories:
            self.bases.append([])
            for region in memory:
                self.bases[-1].append(at)
                padding = -len(region) % 16
                pieces += [region, np.zeros(padding, np.uint8)]
                at += len(region) + padding
        self.bytes = np.concatenate(pieces)

    def region(self, memory: int, number: int, num_bytes: int) -> np.ndarray:
        start = self.bases[memory][number]
        return self.bytes[start : start + num_bytes]

    def run(self, family: Family, src_ids: np.ndarray, dst_ids: np.ndarray) -> None:
        """As the kernel does it, word by word."""
        tables = [
            family.src.astype(np.int64),
            family.dst.astype(np.int64),
            family.src_step.offsets(src_ids),
            family.dst_step.offsets(dst_ids),
        ]
        launch = Launch(family.word_bytes, 0, 0, 0, 0, family.run_words, family.num_runs, len(src_ids))
        src, dst = locate(launch, np.arange(launch.num_words, dtype=np.uint32), tables)
        assert not (src % family.word_bytes).any() and not (dst % family.word_bytes).any(), "misaligned"
        within = np.arange(family.word_bytes)
        self.bytes[np.add.outer(dst, within)] = self.bytes[np.add.outer(src, within)]


def ids_of(pair: Pair, plan: geometry.PairPlan) -> tuple[np.ndarray, np.ndarray]:
    """Units that move: those of blocks that the destination wants, as far as both sides have them."""
    src = units_of(np.array(pair.src_ids, np.int64), plan.src_units)
    dst = units_of(np.array(pair.dst_ids, np.int64), plan.dst_units)
    count = min(len(src), len(dst))
    wanted = dst[:count] >= 0
    return src[:count][wanted], dst[:count][wanted]


@settings(deadline=None, max_examples=200)
@given(pairs(), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_kernel_copies_what_the_plan_means_for_layouts_of_all_kinds(pair: Pair, by_layer: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = pair.sources[0]
    num_tokens = min(len(pair.src_ids) * first.block_size, len(pair.dst_ids) * pair.destinations[0].block_size)
    kv = kv_oracle.model_kv(first, num_tokens, rng)
    sources = {layout.rank: kv_oracle.memory_of(layout, rng) for layout in pair.sources}
    for layout in pair.sources:
        kv_oracle.put(layout, sources[layout.rank], kv, pair.src_ids, num_tokens)
    for layout in pair.destinations:
        memory = kv_oracle.memory_of(layout, rng)
        wanted = [region.copy() for region in memory]
        for rank in source_ranks(first, layout):
            source = next(other for other in pair.sources if other.rank == rank)
            plan = plan_pair(source, layout)
            arena = Arena(sources[rank], memory)
            src_ids, dst_ids = ids_of(pair, plan)
            groups = [parts for _, parts in plan.layers] if by_layer else [plan.parts]
            for parts in groups:
                for family in families(parts, plan, *arena.bases):
                    arena.run(family, src_ids, dst_ids)
            memory = [arena.region(1, n, len(region)).copy() for n, region in enumerate(memory)]
        unit_tokens = int(np.gcd(first.block_size, layout.block_size))
        kv_oracle.put(layout, wanted, kv, pair.dst_ids, num_tokens // unit_tokens * unit_tokens)
        for got, right in zip(memory, wanted, strict=True):
            assert np.array_equal(got, right)


@settings(deadline=None, max_examples=100)
@given(pairs(), st.integers(0, 2**32 - 1))
def test_what_is_packed_on_one_device_and_unpacked_on_another_is_what_a_straight_copy_gives(
    pair: Pair, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    source, layout = pair.sources[0], pair.destinations[0]
    plan = plan_pair(source, layout)
    if plan.is_empty:
        return
    memories = [kv_oracle.memory_of(rank, rng) for rank in (source, layout)]
    src_ids, dst_ids = ids_of(pair, plan)
    straight, staged = Arena(*memories), Arena(*memories, [np.zeros(plan.unit_bytes * max(1, len(src_ids)), np.uint8)])
    for family in families(plan.parts, plan, *straight.bases):
        straight.run(family, src_ids, dst_ids)
    src_bases, dst_bases, (buffer,) = staged.bases
    packed = np.arange(len(src_ids), dtype=np.int64)
    for family in Packing(plan, "src", tuple(src_bases), is_out=True).families(plan.parts, buffer):
        staged.run(family, src_ids, packed)
    for family in Packing(plan, "dst", tuple(dst_bases), is_out=False).families(plan.parts, buffer):
        staged.run(family, packed, dst_ids)
    for number, region in enumerate(memories[1]):
        size = len(region)
        assert np.array_equal(staged.region(1, number, size), straight.region(1, number, size))


@settings(deadline=None, max_examples=100)
@given(pairs(), st.integers(0, 2**32 - 1))
def test_stretches_cover_the_same_bytes_as_the_kernel_and_touch_nowhere(pair: Pair, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source, layout = pair.sources[0], pair.destinations[0]
    plan = plan_pair(source, layout)
    memories = [kv_oracle.memory_of(rank, rng) for rank in (source, layout)]
    one, other = Arena(*memories), Arena(*memories)
    src_ids, dst_ids = ids_of(pair, plan)
    if not len(src_ids):
        return
    for family in families(plan.parts, plan, *one.bases):
        one.run(family, src_ids, dst_ids)
        found = stretches(family, src_ids, dst_ids)
        for src, dst, size in zip(found.src.tolist(), found.dst.tolist(), found.num_bytes.tolist(), strict=True):
            other.bytes[dst : dst + size] = other.bytes[src : src + size]
        touch = (found.src[:-1] + found.num_bytes[:-1] == found.src[1:]) & (
            found.dst[:-1] + found.num_bytes[:-1] == found.dst[1:]
        )
        assert not touch.any()
        mean = mean_stretch_bytes(family, src_ids, dst_ids)
        assert mean <= found.num_bytes.mean()
        if family.num_runs == 1:
            assert mean == found.num_bytes.mean()
    assert np.array_equal(one.bytes, other.bytes)


@settings(max_examples=300)
@given(st.integers(1, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
def test_division_by_multiplication_is_exact(divisor: int, numbers: list[int]) -> None:
    found = Divisor.of(divisor)
    assert found.multiplier < 2**32
    edges = [n for k in (1, 2, 3) for n in (k * divisor - 1, k * divisor) if n < 2**31]
    values = np.array([*numbers, *edges, 2**31 - 1], np.uint32)
    assert np.array_equal(quotient(values, found.multiplier, found.shift), values // np.uint32(divisor))


def test_a_copy_of_more_words_than_the_kernel_counts_is_cut_into_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "MAX_WORDS", 64)
    step = UnitStep(1, 1024, 1024)
    family = Family(256, 16, np.arange(2, dtype=np.uint64), np.arange(2, dtype=np.uint64), step, step)
    assert family.units_per_launch == 2
    assert 2 * family.num_runs * family.run_words == 64


@pytest.mark.parametrize(("words", "blocks"), [(1, 1), (1024, 1), (1025, 2), (10**6, 8)])
def test_a_launch_has_no_more_thread_blocks_than_work(words: int, blocks: int) -> None:
    assert Launch(16, 0, 0, 0, 0, words, 1, 1).grid(8) == blocks


HARNESS = """
#include <cstdint>
struct uint4 { unsigned x, y, z, w; };
struct Dim { unsigned x; };
static Dim blockIdx, threadIdx, gridDim;
#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(n)
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> void __stcs(T* p, T v) { *p = v; }
%s
extern "C" void run(unsigned blocks, const unsigned long long* pointers, const unsigned* n) {
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < THREADS; ++threadIdx.x)
            copy_units((const unsigned long long*)pointers[0], (const unsigned long long*)pointers[1],
                       (const long long*)pointers[2], (const long long*)pointers[3],
                       n[0], n[1], n[2], n[3], n[4], n[5], n[6]);
}
"""


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed, to run the kernel's source without a GPU"
)
@pytest.mark.parametrize("word_bytes", kernel.WORD_TYPES)
def test_the_kernels_own_source_run_on_the_cpu_copies_what_its_twin_says(word_bytes: int, tmp_path: Path) -> None:
    import ctypes

    (tmp_path / "kernel.cpp").write_text(textwrap.dedent(HARNESS) % kernel.source_for(word_bytes))
    library = tmp_path / "kernel.so"
    flags = ["-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    subprocess.run(["g++", *flags, "-o", str(library), str(tmp_path / "kernel.cpp")], check=True, timeout=120)
    run = ctypes.CDLL(str(library)).run
    rng = np.random.default_rng(0)
    for run_words, num_runs, num_units, blocks in [(1, 1, 1, 1), (3, 5, 70, 1), (64, 7, 9, 3), (1025, 2, 3, 4)]:
        run_bytes = run_words * word_bytes
        memory = np.zeros(2 * run_bytes * num_runs * num_units + 16, np.uint8)
        memory = memory[-memory.ctypes.data % 16 :]
        half = run_bytes * num_runs * num_units
        memory[:half] = rng.integers(0, 256, half, dtype=np.uint8)
        base = memory.ctypes.data
        tables = [
            (base + np.arange(num_runs, dtype=np.int64) * run_bytes),
            (base + half + rng.permutation(num_runs) * run_bytes),
            np.arange(num_units, dtype=np.int64) * num_runs * run_bytes,
            rng.permutation(num_units) * num_runs * run_bytes,
        ]
        pointers = [np.ascontiguousarray(table, dtype=np.int64) for table in tables]
        launch = Launch(word_bytes, *(t.ctypes.data for t in pointers), run_words, num_runs, num_units)
        addresses, numbers = launch.arguments()
        wanted = memory.copy()
        src, dst = locate(launch, np.arange(launch.num_words, dtype=np.uint32), pointers)
        within = np.arange(word_bytes)
        wanted[np.add.outer(dst - base, within)] = wanted[np.add.outer(src - base, within)]
        run(blocks, (ctypes.c_ulonglong * 4)(*addresses), (ctypes.c_uint * 7)(*numbers))
        assert np.array_equal(memory, wanted)
