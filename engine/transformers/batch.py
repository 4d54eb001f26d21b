"""From a step's chunks to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from engine.batching.sequence import Sequence
from engine.transformers.paged_kv import PagedKV
from engine.transformers.spans import MAX_GATHER_BYTES, CausalMasks, ChunkSpan, DecodeSpan, PagedPass, group_by_length


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    Attributes:
        input_ids, position_ids: [1, num_tokens]
        last_index: [number of ``finishing``], position in the pass of each one's last known token.
        finishing: the sequences that get a next token from this pass, because all their known tokens are computed.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last_index: torch.Tensor
    paged: PagedPass
    finishing: tuple[Sequence, ...]


def build_batch(kv: PagedKV, work: SequenceOf[tuple[Sequence, int]], masks: CausalMasks) -> Batch:
    """Pack the next ``n`` tokens of each sequence; their blocks are allocated."""
    ordered = sorted(work, key=lambda item: (item[1] > 1, -item[0].num_computed))
    block_size = kv.block_size
    input_ids: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []
    last_index: list[int] = []
    finishing: list[Sequence] = []
    for sequence, count in ordered:
        start = sequence.num_computed
        end = start + count
        input_ids += sequence.tokens[start:end]
        positions += range(start, end)
        blocks += [sequence.blocks[position // block_size] for position in range(start, end)]
        if end == len(sequence.tokens):
            last_index.append(len(input_ids) - 1)
            finishing.append(sequence)
    device = kv.device
    position_ids = torch.tensor(positions, device=device)
    write_index = kv.write_index(torch.tensor(blocks, device=device), position_ids % block_size)
    return Batch(
        torch.tensor([input_ids], device=device),
        position_ids.unsqueeze(0),
        torch.tensor(last_index, dtype=torch.long, device=device),
        PagedPass(kv, write_index, _spans(kv, ordered, masks)),
        tuple(finishing),
    )


def _spans(kv: PagedKV, ordered: SequenceOf[tuple[Sequence, int]], masks: CausalMasks) -> list[DecodeSpan | ChunkSpan]:
    spans: list[DecodeSpan | ChunkSpan] = []
    single = [sequence for sequence, count in ordered if count == 1]
    kv_lens = [sequence.num_computed + 1 for sequence in single]
    for run in group_by_length(kv_lens, MAX_GATHER_BYTES // kv.token_bytes):
        members = single[run.start : run.stop]
        spans.append(DecodeSpan(kv, run.start, [s.blocks for s in members], kv_lens[run.start : run.stop]))
    start = len(single)
    for sequence, count in ordered[len(single) :]:
        before = sequence.num_computed
        spans.append(ChunkSpan(kv, start, sequence.blocks, num_tokens=count, num_before=before, masks=masks))
        start += count
    return spans
