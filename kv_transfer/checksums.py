"""Checksums of what a plan moves, by (layer, unit): both sides of a pair hash the same bytes in the same order."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kv_transfer.errors import InvalidOptions
from kv_transfer.plan import IntArray, PairPlan, Part
from kv_transfer.pool import BlockPool
from kv_transfer.views import BlockView, HostView, has_long_runs

# Names of hashes in options and on the wire; the empty one is for none.
NONE, CRC32, XXH3 = "none", "crc32", "xxh3"
CHECKSUMS = (NONE, CRC32, XXH3)
SUM_BYTES = 8
# Gathered at a time, where the bytes of a layer do not lie together.
_PIECE_BYTES = 1 << 20

Sums = npt.NDArray[np.uint64]
Digest = Callable[[memoryview, int], int]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first bytes that are not those that the source has hashed.

    Attributes:
        layer: of the model.
        src_block, dst_block: ids in the pools.
    """

    layer: int
    src_block: int
    dst_block: int


def load_digest(name: str) -> Digest:
    """``(bytes, seed) -> at most 64 bits``; the seed is the digest of what came before.

    Raises:
        InvalidOptions: no such hash, or its package is not installed.
    """
    if name == CRC32:
        return zlib.crc32
    if name != XXH3:
        raise InvalidOptions("checksum", f"is {name[:80]!r}: known are {', '.join(CHECKSUMS)}")
    try:
        module = importlib.import_module("xxhash")
    except ImportError as exc:
        raise InvalidOptions(
            "checksum", "is 'xxh3', which needs: pip install 'splitwise-sched[checksum]'; 'crc32' needs nothing"
        ) from exc
    digest: Digest = module.xxh3_64_intdigest
    return digest


class LayerSums:
    """Hashes one side of one plan; for one thread."""

    def __init__(self, plan: PairPlan, pool: BlockPool, side: str, digest: Digest) -> None:
        self._plan, self._digest = plan, digest
        self._views = [(pool.view(replace(plan, parts=parts), side), parts) for _, parts in plan.layers]

    def of(self, ids: IntArray) -> Sums:
        """Of units; [num_units, layers of the plan]."""
        digest = self._digest
        sums = np.zeros((len(ids), len(self._views)), np.uint64)
        for column, (view, parts) in enumerate(self._views):
            found = [0] * len(ids)
            for first, pieces in _pieces(view, parts, ids):
                for index, piece in enumerate(pieces, first):
                    found[index] = digest(piece, found[index])
            sums[:, column] = found
        return sums

    def compare(self, src_ids: IntArray, dst_ids: IntArray, wanted: Sums) -> Mismatch | None:
        """The first of the destination's units that does not hash to what the source says; None when all do."""
        wrong = self.of(dst_ids) != wanted
        if not wrong.any():
            return None
        unit, column = (int(index) for index in np.argwhere(wrong)[0])
        return Mismatch(
            layer=self._plan.layers[column][0],
            src_block=int(src_ids[unit]) // self._plan.src_units,
            dst_block=int(dst_ids[unit]) // self._plan.dst_units,
        )


def _pieces(view: BlockView, parts: tuple[Part, ...], ids: IntArray) -> Iterator[tuple[int, list[memoryview]]]:
    """What is hashed one after the other: an index into ``ids``, and a piece of each unit from there on.

    How a unit is cut depends on the plan alone, so that both sides come to the same digests.
    """
    if isinstance(view, HostView) and view.is_direct:
        for part_view in view.parts:
            for pieces in part_view.runs(ids):
                yield 0, pieces
        return
    most = max(1, _PIECE_BYTES // sum(part.num_bytes for part in parts))
    for first in range(0, len(ids), most):
        count = len(ids[first : first + most])
        packed, start = view.gather(ids[first : first + most]).data, 0
        for part in parts:
            size = part.shape[-1] if has_long_runs(parts) else part.num_bytes
            for at in range(0, part.num_bytes, size):
                places = range(start + at, start + at + count * part.num_bytes, part.num_bytes)
                yield first, [packed[place : place + size] for place in places]
            start += count * part.num_bytes
