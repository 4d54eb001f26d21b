"""Engines' own tensors as pools: their strides become a placement, and a wrong description is refused by field."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from kv_transfer.copying import BlockCopier
from kv_transfer.errors import InvalidLayout
from kv_transfer.host_pool import TensorPool
from kv_transfer.layout import KVLayout
from kv_transfer.memory import KVPool
from kv_transfer.plan import plan_pair
from kv_transfer.pool import BlockPool
from kv_transfer.tensors import look_at
from tests import kv_oracle

LAYOUT = KVLayout("e", "m", "float16", 3, 4, 8, 4, 10, tp_size=2, tp_rank=1)
B, T, H, D = 10, 4, 2, 8


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


# What an engine allocates: tensors, and the names of their dimensions.
ENGINES = {
    "vLLM: K and V stacked, a tensor a layer": (
        lambda: [zeros(2, B, T, H, D) for _ in range(3)],
        ("plane", "block", "token", "head", "dim"),
    ),
    "vLLM: blocks first": (
        lambda: [zeros(B, 2, T, H, D) for _ in range(3)],
        ("block", "plane", "token", "head", "dim"),
    ),
    "vLLM: head-major memory under a token-major shape": (
        lambda: [zeros(2, B, H, T, D).transpose(0, 1, 3, 2, 4) for _ in range(3)],
        ("plane", "block", "token", "head", "dim"),
    ),
    "SGLang: K and V apart, slots of tokens": (
        lambda: [zeros(B * T, H, D).reshape(B, T, H, D) for _ in range(6)],
        ("block", "token", "head", "dim"),
    ),
    "one tensor for all layers": (
        lambda: [zeros(3, 2, B, T, H, D)],
        ("layer", "plane", "block", "token", "head", "dim"),
    ),
    "slices of one allocation, with room between": (
        lambda: list(zeros(3, 2, B + 5, T, H + 1, D)[:, :, 2 : B + 2, :, 1:]),
        ("plane", "block", "token", "head", "dim"),
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_move_between_an_engines_tensors_and_a_pool(engine: str) -> None:
    make, names = ENGINES[engine]
    tensors = make()
    rng = np.random.default_rng(0)
    with KVPool.allocate(dataclasses.replace(LAYOUT, tp_size=1, tp_rank=0, block_size=2)) as pool:
        kv = kv_oracle.model_kv(LAYOUT, 12, rng)
        theirs = TensorPool(LAYOUT, tensors, names)
        put(tensors, names, kv, [7, 0, 3])
        move(theirs, pool, [7, 0, 3], [1, 2, 3, 4, 5, 6])
        wanted = [np.zeros_like(pool.regions[0])]
        half = kv.copy()
        half[:, :, :, :2] = 0
        kv_oracle.put(pool.layout, wanted, half, [1, 2, 3, 4, 5, 6], 12)
        assert np.array_equal(pool.regions[0], wanted[0])
        move(pool, theirs, [5, 6, 3, 4, 1, 2], [9, 8, 5])
        put(expected := make(), names, kv, [7, 0, 3])
        put(expected, names, np.concatenate([kv[:, :, 8:], kv[:, :, 4:8], kv[:, :, :4]], axis=2), [9, 8, 5])
        assert [a.tobytes() for a in tensors] == [b.tobytes() for b in expected]


def put(tensors: list[np.ndarray], names: tuple[str, ...], kv: np.ndarray, block_ids: list[int]) -> None:
    """As an engine would: by its own indexing."""
    values = kv.view(np.float16).reshape(3, 2, 12, 4, D)[:, :, :, 2:]
    for layer in range(3):
        for plane in range(2):
            if "layer" in names:
                one = tensors[0][layer, plane]
            elif "plane" in names:
                one = np.moveaxis(tensors[layer], names.index("plane"), 0)[plane]
            else:
                one = tensors[2 * layer + plane]
            for index, block_id in enumerate(block_ids):
                one[block_id] = values[layer, plane, T * index : T * index + T]


def move(source: BlockPool, destination: BlockPool, src_ids: list[int], dst_ids: list[int]) -> None:
    plan = plan_pair(source.layout, destination.layout)
    src = np.array([b * plan.src_units + u for b in src_ids for u in range(plan.src_units)])
    dst = np.array([b * plan.dst_units + u for b in dst_ids for u in range(plan.dst_units)])
    assert BlockCopier(source.view(plan, "src"), destination.view(plan, "dst")).copy(src, dst, lambda: False)


def test_views_of_one_allocation_share_a_region_and_move_as_one_part() -> None:
    whole = zeros(3, 2, B, T, H, D)
    names = ("plane", "block", "token", "head", "dim")
    pool = TensorPool(LAYOUT, list(whole), names)
    assert len(pool.regions) == 1
    assert len(plan_pair(pool.layout, pool.layout).parts) == 1
    apart = TensorPool(LAYOUT, [zeros(2, B, T, H, D) for _ in range(3)], names)
    assert len(apart.regions) == 3


def test_an_opaque_block_needs_no_more_than_contiguous_bytes() -> None:
    layout = dataclasses.replace(LAYOUT, axes="head", kv_planes=1, head_dim=16)
    tensors = [zeros(B, H, T, 16) for _ in range(3)]
    pool = TensorPool(layout, tensors, ("block", "head", "token", "dim"))
    assert pool.layout.shape.run_bytes == (T * 16 * 2,) * 3
    with pytest.raises(InvalidLayout, match="must be contiguous"):
        TensorPool(layout, [zeros(B, H, 2 * T, 16)[:, :, ::2] for _ in range(3)], ("block", "head", "token", "dim"))


def test_layers_of_different_size_are_tensors_of_different_width() -> None:
    layout = dataclasses.replace(
        LAYOUT, axes="none", kv_planes=1, opaque_bytes=(20, 48, 6), num_kv_heads=1, tp_size=1, tp_rank=0
    )
    pool = TensorPool(layout, [zeros(B, size // 2) for size in (20, 48, 6)], ("block", "dim"))
    assert pool.layout.placement is not None
    assert [base.block_stride for base in pool.layout.placement.bases] == [20, 48, 6]


@pytest.mark.parametrize(
    ("tensors", "names", "field"),
    [
        ([zeros(B, T, H, D)] * 3, "block token head dim", "num_layers"),
        ([zeros(2, B + 1, T, H, D)] * 3, "plane block token head dim", "num_blocks"),
        ([zeros(2, B, T + 1, H, D)] * 3, "plane block token head dim", "block_size"),
        ([zeros(2, B, T, 2 * H, D)] * 3, "plane block token head dim", "num_kv_heads"),
        ([zeros(2, B, T, H, 2 * D)] * 3, "plane block token head dim", "head_dim"),
        ([np.zeros((2, B, T, H, D), np.float32)] * 3, "plane block token head dim", "dtype"),
        ([zeros(2, B, T, H, D)] * 3, "plane block token head", "placement"),
        ([zeros(2, B, T, H, D)] * 3, "plane block token head head dim", "placement"),
        ([zeros(2, B, T, H)] * 3, "plane block token head dim", "placement"),
        ([zeros(2, B, T, H, D)] * 3, "plane block token head dim", "placement"),
        ([zeros(2, B, T, D, H).transpose(0, 1, 2, 4, 3)] * 3, "plane block token head dim", "axes"),
        ([b"bytes"] * 3, "plane block token head dim", "placement"),
    ],
)
def test_tensors_that_are_not_what_the_layout_says_are_refused_by_field(tensors, names: str, field: str) -> None:
    with pytest.raises(InvalidLayout) as caught:
        TensorPool(LAYOUT, tensors, names.split())
    assert caught.value.field == field


def test_memory_that_may_not_be_written_is_refused() -> None:
    tensors = [zeros(2, B, T, H, D) for _ in range(3)]
    tensors[1].flags.writeable = False
    with pytest.raises(InvalidLayout, match="read-only"):
        TensorPool(LAYOUT, tensors, ("plane", "block", "token", "head", "dim"))


def test_torch_tensors_are_found_where_they_are() -> None:
    torch = pytest.importorskip("torch")
    whole = torch.zeros(3, 2, B, H, T, D, dtype=torch.float16)
    tensors = [layer.transpose(2, 3) for layer in whole]
    pool = TensorPool(LAYOUT, tensors, ("plane", "block", "token", "head", "dim"))
    assert len(pool.regions) == 1
    assert look_at(tensors[1]).strides == tuple(2 * s for s in tensors[1].stride())
    assert pool.layout.placement is not None
    base = pool.layout.placement.bases[2 * 2 + 1]
    whole[2, 1, 7, 1, 3] = 1.5
    start = base.offset + 7 * base.block_stride + 3 * pool.layout.placement.token_stride
    start += pool.layout.placement.head_stride
    assert (pool.regions[base.region][start : start + 2 * D].view(np.float16) == 1.5).all()


def test_a_tensor_of_another_device_asks_for_a_pool_of_its_kind() -> None:
    torch = pytest.importorskip("torch")

    class OnCuda:
        """A tensor as it would look; there is no device here."""

        def __init__(self, tensor) -> None:
            self._tensor = tensor
            self.device, self.shape = "cuda:0", tensor.shape

        def __getattr__(self, name: str):
            return getattr(self._tensor, name)

    tensors = [OnCuda(torch.zeros(2, B, T, H, D, dtype=torch.float16)) for _ in range(3)]
    with pytest.raises(InvalidLayout, match="cuda:0: use a CudaPool"):
        TensorPool(LAYOUT, tensors, ("plane", "block", "token", "head", "dim"))


def test_registering_torch_tensors_does_not_take_torch() -> None:
    program = (
        "import sys, kv_transfer, kv_transfer.transports.cuda_ipc.pool; "
        "sys.exit('torch' in sys.modules or 'cupy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
