"""KVLayout: sizes, bounds, and which pairs may exchange blocks."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.errors import InvalidLayout, LayoutMismatch
from kv_transfer.layout import KVLayout, check_compatible
from kv_transfer.pairing import destination_ranks, source_ranks
from kv_transfer.placement import check_placement, packed
from kv_transfer.plan import plan_pair

LAYOUT = KVLayout(
    engine="transformers",
    model="abc",
    dtype="bfloat16",
    num_layers=3,
    num_kv_heads=4,
    head_dim=8,
    block_size=16,
    num_blocks=10,
    tp_size=2,
    tp_rank=1,
)
SPLIT = dataclasses.replace(
    LAYOUT,
    pp_layers=(2, 1),
    placement=packed(
        dataclasses.replace(LAYOUT, pp_layers=(2, 1)).shape,
        ("layer", "plane", "block", "token", "head"),
        split=("layer", "plane"),
    ),
)


def test_sizes_follow_from_the_shape() -> None:
    assert LAYOUT.num_rank_heads == 2
    assert LAYOUT.first_head == 2
    assert LAYOUT.row_bytes == 2 * 8 * 2
    assert LAYOUT.layer_block_bytes == 2 * 16 * 32
    assert LAYOUT.block_bytes == 3 * LAYOUT.layer_block_bytes
    assert LAYOUT.pool_bytes == 10 * LAYOUT.block_bytes


def test_more_ranks_than_heads_hold_each_head_on_neighbouring_ranks() -> None:
    ranks = [dataclasses.replace(LAYOUT, num_kv_heads=2, tp_size=8, tp_rank=r) for r in range(8)]
    assert [r.first_head for r in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {r.num_rank_heads for r in ranks} == {1}


@pytest.mark.parametrize("layout", [LAYOUT, SPLIT])
def test_a_layout_survives_json(layout: KVLayout) -> None:
    assert KVLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_a_stage_holds_its_layers_and_ranks_are_numbered_stage_by_stage() -> None:
    stages = [dataclasses.replace(LAYOUT, pp_layers=(2, 1), pp_rank=r) for r in range(2)]
    assert [(s.first_layer, s.num_rank_layers, s.rank, s.num_ranks) for s in stages] == [(0, 2, 1, 4), (2, 1, 3, 4)]
    assert stages[0].block_bytes == 2 * LAYOUT.layer_block_bytes


def test_the_pool_of_a_placement_is_its_regions() -> None:
    assert SPLIT.placement is not None
    assert SPLIT.placement.region_bytes == (10 * 16 * 32,) * 4
    assert SPLIT.pool_bytes == 10 * SPLIT.block_bytes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", ""),
        ("engine", "x" * 300),
        ("model", "a\nb"),
        ("model", 7),
        ("dtype", "complex64"),
        ("packing", "column-major"),
        ("num_layers", 0),
        ("num_layers", True),
        ("num_kv_heads", 2.0),
        ("head_dim", -1),
        ("block_size", 10**9),
        ("num_blocks", 2**31),
        ("num_blocks", 2**28),
        ("num_blocks", "10"),
        ("tp_size", 3),
        ("tp_rank", 2),
        ("tp_rank", None),
        ("kv_planes", 3),
        ("axes", "head+token"),
        ("opaque_format", ""),
        ("opaque_bytes", [1, 2, 3]),
        ("opaque_bytes", 7),
        ("pp_layers", [1, 1]),
        ("pp_layers", [3, 0]),
        ("pp_layers", "12"),
        ("pp_layers", [1.0, 2]),
        ("pp_rank", 1),
        ("tp_size", 2**13),
        ("placement", []),
        ("placement", [[0], [[0, 0, 0]], 0, 0]),
        ("placement", [[2**20], [[0, 0, 4096]] * 6, 64, 32]),
        ("placement", [[2**20], [[0, i, 10] for i in range(6)], 64, 32]),
        ("placement", [[2**20], [[i, 0, 4096] for i in range(6)], 64, 32]),
        ("placement", [[2**20], [[0, 2**20 - 5 + i, 4096] for i in range(6)], 64, 32]),
        ("placement", [[2**20], [[0, i * 70_000, 4096] for i in range(5)], 64, 32]),
        ("placement", [[2**20], [[0, i * 70_000] for i in range(6)], 64, 32]),
        ("placement", [[2**20], [[0, -1, 4096]] * 6, 64, 32]),
        ("placement", [[2**20], [[0, i * 70_000, True] for i in range(6)], 64, 32]),
    ],
)
def test_a_bad_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidLayout) as caught:
        KVLayout.from_dict({**LAYOUT.to_dict(), field: value})
    assert caught.value.field == field


def test_missing_and_unknown_fields_are_refused_by_name() -> None:
    data = LAYOUT.to_dict()
    del data["head_dim"]
    with pytest.raises(InvalidLayout, match="head_dim is missing"):
        KVLayout.from_dict(data)
    with pytest.raises(InvalidLayout, match="colour"):
        KVLayout.from_dict({**LAYOUT.to_dict(), "colour": "red"})
    with pytest.raises(InvalidLayout, match="must be a mapping"):
        KVLayout.from_dict([1])


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*LAYOUT.to_dict(), "x"]), st.one_of(st.integers(), st.text(), st.none())))
def test_no_record_gets_past_from_dict_with_another_error(patch: dict[str, object]) -> None:
    try:
        layout = KVLayout.from_dict({**LAYOUT.to_dict(), **patch})
    except InvalidLayout:
        return
    assert layout.pool_bytes > 0


@pytest.mark.parametrize(
    ("order", "split"),
    [
        (("block", "layer", "plane", "token", "head"), ()),
        (("layer", "plane", "block", "head", "token"), ()),
        (("plane", "layer", "block", "token", "head"), ("plane", "layer")),
        (("layer", "block", "plane", "token", "head"), ("layer",)),
        (("token", "block", "head", "layer", "plane"), ()),
    ],
)
def test_a_dense_packing_has_the_strides_of_a_dense_array(order: tuple[str, ...], split: tuple[str, ...]) -> None:
    shape = LAYOUT.shape
    counts = {"block": 10, "layer": 3, "plane": 2, "token": 16, "head": 2}
    run = shape.run_bytes[0]
    made = packed(shape, order, split=split)
    array = np.empty((*(counts[name] for name in order), run), np.uint8)
    stride = dict(zip(order, array.strides, strict=False))
    region_bytes = array.nbytes
    for name in split:
        region_bytes //= counts[name]
    for layer, plane in itertools.product(range(3), range(2)):
        region, offset, block_stride = made.bases[layer * 2 + plane]
        assert region * region_bytes + offset == layer * stride["layer"] + plane * stride["plane"]
        assert block_stride == stride["block"]
    assert (made.token_stride, made.head_stride) == (stride["token"], stride["head"])
    assert set(made.region_bytes) == {region_bytes}
    check_placement(made, shape)


def test_an_order_that_cannot_be_is_refused() -> None:
    for order, split in ((("block", "layer"), ()), (("block", "layer", "plane", "token", "head"), ("layer",))):
        with pytest.raises(InvalidLayout, match="packing"):
            packed(LAYOUT.shape, order, split=split)


@pytest.mark.parametrize("field", ["engine", "model", "dtype", "num_layers", "num_kv_heads", "head_dim"])
def test_a_mismatch_names_the_field_and_both_values(field: str) -> None:
    mine = getattr(LAYOUT, field)
    other = "float16" if field == "dtype" else mine * 2
    with pytest.raises(LayoutMismatch) as caught:
        check_compatible(LAYOUT, dataclasses.replace(LAYOUT, **{field: other}))
    assert (caught.value.field, caught.value.mine, caught.value.theirs) == (field, str(mine), str(other))


def test_pools_of_other_sizes_ranks_and_order_are_compatible() -> None:
    other = dataclasses.replace(LAYOUT, num_blocks=99, tp_size=1, tp_rank=0, packing="layer-major-hnd", block_size=8)
    check_compatible(LAYOUT, other)
    check_compatible(LAYOUT, SPLIT)


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.sampled_from([*LAYOUT.to_dict()]), st.one_of(st.integers(-1, 70), st.lists(st.integers(0, 9))))
)
def test_whatever_is_compatible_has_a_plan(patch: dict[str, object]) -> None:
    """A peer is told so before it proves anything; planning comes after, and must not fail."""
    try:
        theirs = KVLayout.from_dict({**LAYOUT.to_dict(), **patch})
        check_compatible(LAYOUT, theirs)
    except (InvalidLayout, LayoutMismatch):
        return
    for src, dst in ((LAYOUT, theirs), (theirs, LAYOUT)):
        plan = plan_pair(src, dst)
        assert plan.is_empty or plan.unit_bytes > 0
        assert (src.rank in source_ranks(src, dst)) == (dst.rank in destination_ranks(src, dst))
