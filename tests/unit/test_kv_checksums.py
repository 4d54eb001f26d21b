"""Checksums of plans: both sides agree, and a byte that is not as it was is found where it lies."""

from __future__ import annotations

import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_transfer import checksums, views
from kv_transfer.checksums import LayerSums, Mismatch, load_digest
from kv_transfer.errors import InvalidOptions
from kv_transfer.layout import KVLayout
from kv_transfer.options import TransferOptions
from kv_transfer.pairing import source_ranks
from kv_transfer.plan import PairPlan, plan_pair, units_of
from kv_transfer.pool import BlockPool
from kv_transfer.views import BlockView, HostView
from tests import kv_oracle
from tests.integration.kv_instances import need_xxhash
from tests.kv_layouts import Pair, pairs


class Bytes(BlockPool):
    """A pool of plain arrays."""

    def __init__(self, layout: KVLayout, seed: int, packed_at: str | None) -> None:
        super().__init__(layout)
        self.packed_at = packed_at
        self.arrays = kv_oracle.memory_of(layout, np.random.default_rng(seed))

    def view(self, plan: PairPlan, side: str) -> BlockView:
        found = HostView(plan, side, self.layout.num_blocks, self.arrays)
        if side == self.packed_at:
            found.is_direct = False
        return found


@pytest.mark.parametrize("run_bytes", [1, 1 << 20], ids=["run by run", "packed"])
@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
@pytest.mark.parametrize("packed_at", [None, "src"], ids=["both alike", "a device at the source"])
def test_a_flipped_byte_is_found_in_its_layer_and_block_and_nothing_else_is(
    piece_bytes: int, run_bytes: int, packed_at: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(views, "DIRECT_RUN_BYTES", run_bytes)

    @settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
    @given(pairs(), st.integers(0, 2**32 - 1))
    def check(pair: Pair, seed: int) -> None:
        rng = np.random.default_rng(seed)
        dst = pair.destinations[-1]
        src = pair.sources[source_ranks(pair.sources[0], dst)[0]]
        plan = plan_pair(src, dst)
        if plan.is_empty:
            return
        source, destination = Bytes(src, seed, packed_at), Bytes(dst, seed + 1, packed_at)
        src_ids = units_of(np.array(pair.src_ids), plan.src_units)
        dst_ids = units_of(rng.permutation(dst.num_blocks), plan.dst_units)
        count = min(len(src_ids), len(dst_ids))
        src_ids, dst_ids = src_ids[:count], dst_ids[:count]
        destination.view(plan, "dst").scatter(dst_ids, source.view(plan, "src").gather(src_ids))
        digest = load_digest("crc32")
        wanted = LayerSums(plan, source, "src", digest).of(src_ids)
        assert wanted.shape == (count, len(plan.layers))
        sums = LayerSums(plan, destination, "dst", digest)
        assert sums.compare(src_ids, dst_ids, wanted) is None
        layer, parts = plan.layers[rng.integers(len(plan.layers))]
        part, unit = parts[rng.integers(len(parts))], int(rng.integers(count))
        block, within = divmod(int(dst_ids[unit]), plan.dst_units)
        at = part.dst.offset + block * part.dst.block_stride + within * part.dst.unit_stride
        at += sum(int(rng.integers(n)) * s for n, s in zip(part.shape, (*part.dst.strides, 1), strict=True))
        destination.arrays[part.dst.region][at] ^= 1 << int(rng.integers(8))
        assert sums.compare(src_ids, dst_ids, wanted) == Mismatch(layer, int(src_ids[unit]) // plan.src_units, block)

    check()


@pytest.mark.parametrize("name", ["crc32", "xxh3"])
def test_hashes_chain_over_parts(name: str) -> None:
    if name == "xxh3":
        need_xxhash()
    digest = load_digest(name)
    first, second = memoryview(b"K" * 100), memoryview(b"V" * 100)
    assert digest(second, digest(first, 0)) != digest(first, digest(second, 0))
    assert 0 <= digest(first, 0) < 2**64
    assert load_digest("crc32")(memoryview(b"KV"), 0) == zlib.crc32(b"KV")


def test_a_hash_that_is_not_there_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidOptions, match="known are none, crc32, xxh3"):
        TransferOptions(checksum="md5")
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(InvalidOptions, match=r"pip install 'splitwise-sched\[checksum\]'"):
        TransferOptions(checksum="xxh3")
