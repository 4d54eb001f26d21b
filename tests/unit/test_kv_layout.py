"""KVLayout: sizes, bounds, and which pairs may exchange blocks."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.errors import InvalidLayout, LayoutMismatch
from kv_transfer.layout import KVLayout, check_compatible

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


def test_a_layout_survives_json() -> None:
    assert KVLayout.from_dict(json.loads(json.dumps(LAYOUT.to_dict()))) == LAYOUT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", ""),
        ("engine", "x" * 300),
        ("model", "a\nb"),
        ("model", 7),
        ("dtype", "complex64"),
        ("packing", "layer-major"),
        ("num_layers", 0),
        ("num_layers", True),
        ("num_kv_heads", 2.0),
        ("head_dim", -1),
        ("block_size", 10**9),
        ("num_blocks", 2**31),
        ("num_blocks", "10"),
        ("tp_size", 3),
        ("tp_rank", 2),
        ("tp_rank", None),
        ("kv_planes", 3),
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


@pytest.mark.parametrize("field", ["engine", "model", "dtype", "num_layers", "num_kv_heads", "head_dim", "block_size"])
def test_a_mismatch_names_the_field_and_both_values(field: str) -> None:
    mine = getattr(LAYOUT, field)
    other = "float16" if field == "dtype" else mine * 2
    with pytest.raises(LayoutMismatch) as caught:
        check_compatible(LAYOUT, dataclasses.replace(LAYOUT, **{field: other}))
    assert (caught.value.field, caught.value.mine, caught.value.theirs) == (field, str(mine), str(other))


def test_pools_of_other_sizes_and_other_tp_are_compatible() -> None:
    check_compatible(LAYOUT, dataclasses.replace(LAYOUT, num_blocks=99, tp_size=1, tp_rank=0))
