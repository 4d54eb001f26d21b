"""Layouts for property tests: pairs of whole instances whose blocks mean the same, and lie as differently as can be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import strategies as st

from kv_transfer.layout import KVLayout
from kv_transfer.placement import Base, Placement, packed

AXIS_NAMES = ("block", "layer", "plane", "token", "head")


@dataclass(frozen=True)
class Pair:
    """All ranks of two instances, and the blocks that a sequence has in each; negative ones are not wanted."""

    sources: list[KVLayout]
    destinations: list[KVLayout]
    src_ids: list[int]
    dst_ids: list[int]


def tp_sizes(num_kv_heads: int) -> list[int]:
    return [n for n in range(1, 9) if num_kv_heads % n == 0 or n % num_kv_heads == 0]


@st.composite
def placements(draw: st.DrawFn, layout: KVLayout) -> Placement | None:
    """None, or any order of axes, split into regions or not, with gaps before, between and after."""
    if draw(st.booleans()):
        return None
    split = draw(st.sampled_from([(), ("layer",), ("layer", "plane"), ("plane", "layer")]))
    rest = draw(st.permutations([name for name in AXIS_NAMES if name not in split]))
    dense = packed(layout.shape, (*split, *rest), split=split)
    head, tail = draw(st.sampled_from([0, 8, 3])), draw(st.sampled_from([0, 8, 5]))
    gap = draw(st.sampled_from([0, 16, 7])) if rest[0] == "block" else 0
    return Placement(
        region_bytes=tuple(
            size + head * (region + 1) + tail + gap * (layout.num_blocks - 1)
            for region, size in enumerate(dense.region_bytes)
        ),
        bases=tuple(Base(b.region, b.offset + head * (b.region + 1), b.block_stride + gap) for b in dense.bases),
        token_stride=dense.token_stride,
        head_stride=dense.head_stride,
    )


@st.composite
def instances(draw: st.DrawFn, model: KVLayout, num_blocks: int) -> list[KVLayout]:
    """All ranks of an instance that holds ``model``, each with a placement of its own."""
    tied = model.axes in ("token", "none") and model.num_kv_heads > 1
    tp_size = model.tp_size if tied else draw(st.sampled_from(tp_sizes(model.num_kv_heads)))
    cuts = sorted(draw(st.sets(st.integers(1, model.num_layers - 1), max_size=3))) if model.num_layers > 1 else []
    stages = tuple(b - a for a, b in zip([0, *cuts], [*cuts, model.num_layers], strict=True))
    if len(stages) == 1 and draw(st.booleans()):
        stages = ()
    packing = draw(st.sampled_from(["block-major", "block-major-hnd", "layer-major", "layer-major-hnd"]))
    ranks = []
    for pp_rank in range(max(1, len(stages))):
        for tp_rank in range(tp_size):
            rank = replace(
                model,
                num_blocks=num_blocks,
                packing=packing,
                tp_size=tp_size,
                tp_rank=tp_rank,
                pp_layers=stages,
                pp_rank=pp_rank,
            )
            ranks.append(replace(rank, placement=draw(placements(rank))))
    return ranks


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    axes = draw(st.sampled_from(["token+head", "token+head", "token", "head", "none"]))
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    model = KVLayout(
        engine="e",
        model="m",
        dtype=draw(st.sampled_from(["uint8", "float16", "float64"])),
        num_layers=draw(st.integers(1, 4)),
        num_kv_heads=heads,
        head_dim=draw(st.sampled_from([1, 3, 4])),
        block_size=draw(st.sampled_from([1, 2, 3, 4, 6])),
        num_blocks=1,
        tp_size=draw(st.sampled_from(tp_sizes(heads))),
        kv_planes=draw(st.integers(1, 2)),
        axes=axes,
    )
    other_size = draw(st.sampled_from([1, 2, 3, 4, 8])) if "token" in axes else model.block_size
    num_tokens = draw(st.integers(1, 14))
    src_count, dst_count = -(-num_tokens // model.block_size), -(-num_tokens // other_size)
    src_pool, dst_pool = src_count + draw(st.integers(0, 3)), dst_count + draw(st.integers(0, 3))
    dst_ids = draw(st.permutations(range(dst_pool)))[:dst_count]
    for index in draw(st.sampled_from([range(0), range(draw(st.integers(0, dst_count))), range(0, dst_count, 2)])):
        dst_ids[index] = -1
    return Pair(
        sources=draw(instances(model, src_pool)),
        destinations=draw(instances(replace(model, block_size=other_size), dst_pool)),
        src_ids=draw(st.permutations(range(src_pool)))[:src_count],
        dst_ids=dst_ids,
    )
