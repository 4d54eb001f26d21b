"""What a rank's memory must hold, worked out byte address by byte address, with no help from the plan.

A model's KV is an array [layer, plane, token of the sequence, KV head, byte of the head]. A rank's memory is filled, or
checked, by walking over every (block, layer, plane, token, head) of its layout and computing where that lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kv_transfer.layout import KVLayout, placement_of

Memory = list[np.ndarray]


def memory_of(layout: KVLayout, rng: np.random.Generator) -> Memory:
    """Regions full of random bytes."""
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in placement_of(layout).region_bytes]


def model_kv(layout: KVLayout, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    shape = (layout.num_layers, layout.kv_planes, num_tokens, layout.num_kv_heads, layout.head_bytes)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def put(layout: KVLayout, memory: Memory, kv: np.ndarray, block_ids: Sequence[int], num_tokens: int) -> None:
    """Write the sequence's first ``num_tokens`` tokens into a rank's blocks; those that are negative are left out."""
    for index, block_id in enumerate(block_ids):
        if block_id < 0:
            continue
        first = index * layout.block_size
        for region, start, values in runs(layout, block_id, kv, first, min(layout.block_size, num_tokens - first)):
            memory[region][start : start + len(values)] = values


def runs(
    layout: KVLayout, block_id: int, kv: np.ndarray, first_token: int, num_tokens: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Each contiguous run of one block: its region, where it starts there, and its bytes."""
    place = placement_of(layout)
    heads = range(layout.first_head, layout.first_head + layout.num_rank_heads)
    for layer in range(layout.num_rank_layers):
        for plane in range(layout.kv_planes):
            base = place.bases[layer * layout.kv_planes + plane]
            start = base.offset + block_id * base.block_stride
            tokens = kv[layout.first_layer + layer, plane, first_token : first_token + num_tokens]
            if layout.axes == "token+head":
                for t in range(num_tokens):
                    for h, head in enumerate(heads):
                        at = start + t * place.token_stride + h * place.head_stride
                        yield base.region, at, tokens[t, head]
            elif layout.axes == "token":
                for t in range(num_tokens):
                    yield base.region, start + t * place.token_stride, tokens[t, heads[0] : heads[-1] + 1].reshape(-1)
            elif layout.axes == "head":
                for h, head in enumerate(heads):
                    yield base.region, start + h * place.head_stride, tokens[:, head].reshape(-1)
            else:
                yield base.region, start, tokens[:, heads[0] : heads[-1] + 1].reshape(-1)
