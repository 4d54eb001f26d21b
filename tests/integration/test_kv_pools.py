"""Pools that are not ours, an engine's tensors, on every transport that moves host memory."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from kv_transfer import KVPool, PoolNotServed, Received, Sent, TensorPool, TransferOptions
from kv_transfer.transports.registry import installed_transports
from tests.integration.kv_instances import MODEL, lane_options
from tests.integration.kv_pairs import Ranks
from tests.integration.kv_rank import LocalRank

NAMES = ("plane", "block", "token", "head", "dim")
SHAPE = (2, MODEL.num_blocks, MODEL.block_size, MODEL.num_kv_heads, MODEL.head_dim)


def tensors(seed: int) -> list[np.ndarray]:
    """K and V of each layer, as an engine holds them."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2**16, SHAPE, dtype=np.uint16) for _ in range(MODEL.num_layers)]


@pytest.mark.parametrize("checksum", ["none", "crc32"])
@pytest.mark.parametrize("lane", [lane for lane in installed_transports() if lane != "cuda_ipc"])
def test_blocks_arrive_in_an_engines_own_tensors(ranks: Ranks, lane: str, checksum: str) -> None:
    options = lane_options(lane, checksum=checksum)
    source = ranks.local(MODEL, options, "prefill", pool=KVPool.allocate(MODEL))
    source.fill(1)
    owned = tensors(2)
    wanted = [tensor.copy() for tensor in owned]
    # A pool that cannot be served by this transport can be fetched into by it all the same.
    served_too = replace(options, protocols=(*options.protocols, "tcp"))
    destination = ranks.local(MODEL, served_too, "decode", pool=TensorPool(MODEL, owned, NAMES))
    destination.receive("r@1", [source.endpoint], [3, 1, 2])
    source.send("r@1", [20, 5, 6])
    received = destination.wait("r@1")
    assert isinstance(received, Received)
    assert received.stats.lane == lane
    assert isinstance(source.wait("r@1"), Sent)
    blocks = source.view.view(np.uint16).reshape(MODEL.num_blocks, MODEL.num_layers, *SHAPE[:1], *SHAPE[2:])
    for layer, tensor in enumerate(wanted):
        tensor[:, [3, 1, 2]] = blocks[[20, 5, 6], layer].swapaxes(0, 1)
        assert np.array_equal(owned[layer], tensor), f"layer {layer}"


def test_a_pool_that_peers_cannot_map_is_fetched_from_by_tcp_and_both_sides_say_so(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    options = TransferOptions(protocols=("ipc", "tcp"))
    owned = tensors(1)
    with caplog.at_level(logging.WARNING, "kv_transfer"):
        source = ranks.local(MODEL, options, "prefill", pool=TensorPool(MODEL, owned, NAMES))
    assert "peers cannot fetch KV from prefill by shm: the pool is private memory of this process" in caplog.text
    assert source.counters()["not_served_total"] == 1
    destination = ranks.local(MODEL, options, "decode", pool=KVPool.allocate(MODEL))
    destination.receive("r@1", [source.endpoint], [0, 1, 2])
    source.send("r@1", [7, 9, 8])
    received = destination.wait("r@1")
    assert isinstance(received, Received)
    assert received.stats.lane == "tcp"
    blocks = destination.view.view(np.uint16).reshape(MODEL.num_blocks, MODEL.num_layers, *SHAPE[:1], *SHAPE[2:])
    for layer, tensor in enumerate(owned):
        assert np.array_equal(blocks[:3, layer].swapaxes(0, 1), tensor[:, [7, 9, 8]])


def test_a_rank_whose_pool_no_transport_can_serve_does_not_start() -> None:
    with pytest.raises(PoolNotServed, match="name tcp as well"):
        LocalRank(MODEL, TransferOptions(protocols=("shm",)), "prefill", pool=TensorPool(MODEL, tensors(1), NAMES))


def test_torch_tensors_of_an_engine_are_moved_where_they_are(ranks: Ranks) -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.bfloat16] * MODEL.num_layers
    sent = [torch.randn(SHAPE, generator=generator).to(kind) for kind in kinds]
    arrived = [torch.zeros_like(tensor) for tensor in sent]
    options = TransferOptions(protocols=("tcp",))
    source = ranks.local(MODEL, options, "prefill", pool=TensorPool(MODEL, sent, NAMES))
    destination = ranks.local(MODEL, options, "decode", pool=TensorPool(MODEL, arrived, NAMES))
    destination.receive("r@1", [source.endpoint], [4, 5, 23])
    source.send("r@1", [0, 23, 11])
    assert isinstance(destination.wait("r@1"), Received)
    for mine, theirs in zip(arrived, sent, strict=True):
        wanted = torch.zeros_like(theirs)
        wanted[:, [4, 5, 23]] = theirs[:, [0, 23, 11]]
        assert torch.equal(mine, wanted)
