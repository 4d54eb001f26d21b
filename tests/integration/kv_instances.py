"""Whole instances for transfer tests: their layouts, their ranks, and KV of one sequence in them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from kv_transfer import (
    NOT_WANTED,
    KVLayout,
    Messenger,
    RdmaOptions,
    Received,
    Sent,
    TransferOptions,
    TransportFailed,
    UnknownTransport,
)
from kv_transfer.placement import packed
from kv_transfer.plan import units_of
from kv_transfer.transports.registry import installed_transports
from tests import kv_oracle
from tests.integration.kv_memory import make_pool, spare_time
from tests.integration.kv_rank import IN_VM, LocalRank

MODEL = KVLayout("e", "m", "bfloat16", 6, 4, 16, 4, 24)
MLA = replace(MODEL, num_kv_heads=1, kv_planes=1)
OPAQUE = replace(MODEL, axes="none", opaque_format="packed by the engine")
RDMA_WRITE = "rdma_write"
TENSOR_A_LAYER = ("layer", "block", "plane", "token", "head")
K_AND_V_APART = ("layer", "plane", "block", "token", "head")


def instance(
    model: KVLayout,
    *,
    tp: int = 1,
    stages: Sequence[int] = (),
    split: tuple[str, ...] = (),
    order: tuple[str, ...] = (),
) -> list[KVLayout]:
    """All ranks; each with ``order`` and ``split`` for its placement, if given."""
    ranks = []
    for pp_rank in range(max(1, len(stages))):
        for tp_rank in range(tp):
            rank = replace(model, tp_size=tp, tp_rank=tp_rank, pp_layers=tuple(stages), pp_rank=pp_rank)
            ranks.append(replace(rank, placement=packed(rank.shape, order, split=split)) if order else rank)
    return ranks


# Source and destination, by what is special about them.
PAIRS: dict[str, tuple[list[KVLayout], list[KVLayout]]] = {
    "a tensor a layer to one pool": (
        instance(MODEL, order=TENSOR_A_LAYER, split=("layer",)),
        instance(MODEL),
    ),
    "one pool to tensors for K and V of each layer": (
        instance(MODEL),
        instance(MODEL, order=K_AND_V_APART, split=("layer", "plane")),
    ),
    "token-major to head-major, block-major to layer-major": (
        instance(MODEL),
        instance(replace(MODEL, packing="layer-major-hnd")),
    ),
    "TP 4 to 2, head-major": (
        instance(replace(MODEL, packing="block-major-hnd"), tp=4),
        instance(replace(MODEL, packing="block-major-hnd"), tp=2),
    ),
    "TP 1 to 8, each head on two ranks": (instance(MODEL), instance(MODEL, tp=8)),
    "TP 8 to 2, each head on two ranks": (instance(MODEL, tp=8), instance(MODEL, tp=2)),
    "TP 2 in 2 stages to TP 1 in 3": (instance(MODEL, tp=2, stages=(2, 4)), instance(MODEL, stages=(1, 3, 2))),
    "one rank to TP 2 in 2 stages of tensors": (
        instance(MODEL),
        instance(MODEL, tp=2, stages=(3, 3), order=K_AND_V_APART, split=("layer", "plane")),
    ),
    "blocks of 4 to blocks of 6 tokens": (instance(MODEL), instance(replace(MODEL, block_size=6))),
    "blocks of 6 to blocks of 4 tokens, TP 2 to 1": (
        instance(replace(MODEL, block_size=6), tp=2),
        instance(replace(MODEL, packing="layer-major")),
    ),
    "MLA, TP 4 to 2": (instance(MLA, tp=4), instance(MLA, tp=2)),
    "opaque blocks of TP 2, each layer apart": (
        instance(OPAQUE, tp=2, order=TENSOR_A_LAYER, split=("layer",)),
        instance(OPAQUE, tp=2),
    ),
}


def need_xxhash() -> None:
    """It comes with the extra ``checksum``."""
    if importlib.util.find_spec("xxhash") is None:
        assert os.environ.get("CI") != "true", "xxhash is not installed"
        pytest.skip("xxhash is not installed")


def lanes() -> list[str]:
    """What a suite for every transport runs on: all that are registered, and rdma also in write mode."""
    return sorted([*installed_transports(), RDMA_WRITE])


def lane_options(lane: str, **other: Any) -> TransferOptions:
    """Options with one transport only; skips what this host cannot run."""
    if lane == RDMA_WRITE:
        lane, other = "rdma", {"rdma": RdmaOptions(mode="write"), **other}
    if other.get("checksum") == "xxh3":
        need_xxhash()
    if (obstacle := _obstacle(lane)) is not None:
        pytest.skip(f"{lane} does not run here: {obstacle}")
    patience = {"silence_s": 20.0} if IN_VM else {}
    return TransferOptions(protocols=(lane,), secret="a secret", **{**patience, **other})


@lru_cache(maxsize=16)
def _obstacle(lane: str) -> str | None:
    options = TransferOptions(protocols=(lane,))
    with contextlib.closing(make_pool(MODEL, options)) as pool:
        try:
            probe = Messenger(pool, spare_time(options), name="probe")
        except UnknownTransport as exc:
            return str(exc)
        try:
            probe.start()
        except TransportFailed as exc:
            if lane != "rdma" or IN_VM:
                raise
            return str(exc)
        finally:
            probe.close()
    return None


class Move:
    """KV of one sequence, in the blocks of a source and on its way into those of a destination."""

    def __init__(
        self,
        sources: list[KVLayout],
        destinations: list[KVLayout],
        make: Callable[..., LocalRank],
        *,
        num_tokens: int,
        seed: int = 0,
        cached: Callable[[int], bool] = lambda index: False,
    ) -> None:
        """
        Args:
            cached: whether the destination has its block of a given index already.
        """
        self._rng = np.random.default_rng(seed)
        rng = random.Random(seed)
        src, dst = sources[0], destinations[0]
        self.src_ids = rng.sample(range(src.num_blocks), -(-num_tokens // src.block_size))
        wanted = rng.sample(range(dst.num_blocks), -(-num_tokens // dst.block_size))
        self.dst_ids = [NOT_WANTED if cached(index) else block for index, block in enumerate(wanted)]
        self._room = min(len(self.src_ids) * src.block_size, len(self.dst_ids) * dst.block_size)
        self.kv = kv_oracle.model_kv(src, len(self.src_ids) * src.block_size, self._rng)
        self.sources = [make(layout, name=f"prefill {layout.rank}") for layout in sources]
        self.destinations = [make(layout, name=f"decode {layout.rank}") for layout in destinations]
        self._wanted = []
        for rank in self.sources:
            memory = kv_oracle.memory_of(rank.layout, self._rng)
            kv_oracle.put(rank.layout, memory, self.kv, self.src_ids, self.kv.shape[2])
            self._fill(rank, memory)
        for rank in self.destinations:
            memory = kv_oracle.memory_of(rank.layout, self._rng)
            self._fill(rank, memory)
            kv_oracle.put(rank.layout, memory, self.kv, self.dst_ids, self._room)
            self._wanted.append(memory)

    @staticmethod
    def _fill(rank: LocalRank, memory: kv_oracle.Memory) -> None:
        for region, data in zip(rank.regions, memory, strict=True):
            region[:] = data

    @property
    def num_bytes(self) -> int:
        """That must move into all destination ranks."""
        src, dst = self.sources[0].layout, self.destinations[0].layout
        unit_tokens = int(np.gcd(src.block_size, dst.block_size))
        held = units_of(np.array(self.dst_ids), dst.block_size // unit_tokens)[: self._room // unit_tokens]
        per_token = sum(rank.layout.block_bytes for rank in self.destinations) // dst.block_size
        return int((held >= 0).sum()) * unit_tokens * per_token

    def move(self, transfer_id: str, aux: bytes) -> None:
        """In three chunks, out of order; checks both sides' events, and every byte of the destination's memory."""
        endpoints = [rank.endpoint for rank in self.sources]
        for rank in self.destinations:
            rank.receive(transfer_id, endpoints, self.dst_ids)
        third = -(-len(self.src_ids) // 3)
        for rank in self.sources:
            rank.open_send(transfer_id, len(self.src_ids))
            for first in (third, 0, 2 * third):
                if first < len(self.src_ids):
                    rank.send_blocks(transfer_id, first, self.src_ids[first : first + third])
            rank.finish_send(transfer_id, aux)
        received = [rank.wait(transfer_id) for rank in self.destinations]
        sent = [rank.wait(transfer_id) for rank in self.sources]
        for event in received:
            assert isinstance(event, Received), event
            assert event.aux == aux
        for event in sent:
            assert isinstance(event, Sent), event
        assert sum(event.stats.num_bytes for event in received) == self.num_bytes
        assert sum(event.stats.num_bytes for event in sent) == self.num_bytes
        for rank, memory in zip(self.destinations, self._wanted, strict=True):
            for number, (got, right) in enumerate(zip(rank.regions, memory, strict=True)):
                assert np.array_equal(got, right), f"{rank.endpoint.name}, region {number}"
