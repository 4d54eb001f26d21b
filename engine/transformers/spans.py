"""One forward pass over the paged pool, in spans: one token of several sequences, or a chunk of one.

Indices and masks are made once a pass, for each sliding window that some layer has, and shared by its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from engine.transformers.attention import Rule, attend
from engine.transformers.paged_kv import PagedKV

# Queries of a chunk that see earlier KV, or a window, go in slices of so many, each with the KV that it can see.
QUERY_SLICE = 256
# Gathered KV of one call: beyond this it falls out of the CPU's cache before attention reads it.
MAX_GATHER_BYTES = 4 << 20
# Sequences share a call while padding adds at most this share of work.
MAX_PADDING = 0.25


class Span(Protocol):
    """What one attention call of a pass covers: some of its tokens, all of equal query length."""

    @property
    def tokens(self) -> slice: ...

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """Attention of this span's queries; the KV of all tokens of the pass is in the pool.

        Args:
            query: [1, num_heads, num_tokens, head_dim]
            key, value: of this span's own tokens, [1, num_kv_heads, num_tokens, head_dim]
        Returns:
            [num_tokens, num_heads, head_dim]
        """
        ...


@dataclass(frozen=True, slots=True)
class PagedPass:
    """One forward pass: where its tokens' KV goes, and what each of its spans attends to.

    Attributes:
        write_index: [num_tokens], for ``PagedKV.write``.
        spans: cover the tokens without gaps, in order.
    """

    kv: PagedKV
    write_index: torch.Tensor
    spans: Sequence[Span]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """Store K and V of one layer's new tokens in the pool, and attend. Widths are padded to the pool's."""
        value_width = value.shape[-1]
        query, key, value = (_pad(states, self.kv.head_dim) for states in (query, key, value))
        self.kv.write(layer, self.write_index, key.transpose(0, 1), value.transpose(0, 1))
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        parts = [
            span.attend(layer, query[:, :, span.tokens], key[:, :, span.tokens], value[:, :, span.tokens], rule)
            for span in self.spans
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out[..., :value_width]


def _pad(states: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - states.shape[-1]
    return F.pad(states, (0, missing)) if missing else states


def group_by_length(kv_lens: Sequence[int], max_tokens: int) -> list[range]:
    """Cut sequences, longest first, into runs that attend together.

    Args:
        kv_lens: not increasing.
        max_tokens: padded tokens of a run with more than one sequence, at most.
    """
    runs: list[range] = []
    start = total = 0
    for i, kv_len in enumerate(kv_lens):
        padded = kv_lens[start] * (i + 1 - start)
        if i > start and (padded > max_tokens or padded > (total + kv_len) * (1 + MAX_PADDING)):
            runs.append(range(start, i))
            start, total = i, 0
        total += kv_len
    if kv_lens:
        runs.append(range(start, len(kv_lens)))
    return runs


class CausalMasks:
    """Additive masks of query slices at the end of their KV; they depend on the distance from the end alone.

    One for each window, kept from pass to pass and made larger when a longer sequence comes.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._masks: dict[int | None, torch.Tensor] = {}

    def get(self, num_queries: int, num_tokens: int, window: int | None) -> torch.Tensor:
        """[num_queries, num_tokens], for at most ``QUERY_SLICE`` queries, which are the last of the tokens."""
        mask = self._masks.get(window)
        if mask is None or mask.shape[1] < num_tokens:
            size = num_tokens if mask is None else max(num_tokens, 2 * mask.shape[1])
            mask = self._masks[window] = self._make(size, window)
        return mask[QUERY_SLICE - num_queries :, mask.shape[1] - num_tokens :]

    def _make(self, num_tokens: int, window: int | None) -> torch.Tensor:
        token = torch.arange(-num_tokens, 0, device=self._device)
        query = torch.arange(-QUERY_SLICE, 0, device=self._device).unsqueeze(1)
        hidden = token > query
        if window is not None:
            hidden |= token <= query - window
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, float("-inf"))


class DecodeSpan:
    """One new token of each of several sequences.

    Args:
        block_tables: one for each sequence; may be longer than its tokens need.
        kv_lens: tokens of each sequence, the new one included.
    """

    def __init__(self, kv: PagedKV, start: int, block_tables: Sequence[Sequence[int]], kv_lens: Sequence[int]) -> None:
        self.tokens = slice(start, start + len(kv_lens))
        self._kv = kv
        self._block_tables, self._kv_lens = block_tables, kv_lens
        self._views: dict[int | None, tuple[torch.Tensor, int, torch.Tensor | None]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        view = self._views.get(rule.window)
        if view is None:
            view = self._views[rule.window] = self._view(rule.window)
        index, num_tokens, mask = view
        key, value = self._kv.gather(layer, index, len(self._kv_lens))
        key, value = key[:, :, :num_tokens], value[:, :, :num_tokens]
        return attend(query.permute(2, 1, 0, 3), key, value, rule, mask=mask).squeeze(2)

    def _view(self, window: int | None) -> tuple[torch.Tensor, int, torch.Tensor | None]:
        """Gather index, tokens to read of each sequence, and mask where they see different ones of these."""
        block_size, device = self._kv.block_size, self._kv.device
        first_seen = [max(0, n - window) if window else 0 for n in self._kv_lens]
        first_blocks = [first // block_size for first in first_seen]
        ends = [n - block * block_size for n, block in zip(self._kv_lens, first_blocks, strict=True)]
        begins = [first - block * block_size for first, block in zip(first_seen, first_blocks, strict=True)]
        num_tokens = max(ends)
        width = -(-num_tokens // block_size)
        rows = []
        for table, first_block, end in zip(self._block_tables, first_blocks, ends, strict=True):
            row = list(table[first_block : first_block - (-end // block_size)])
            # Padding repeats a block of the sequence's own: what it holds is masked, but must be finite.
            rows.append(row + row[-1:] * (width - len(row)))
        index = self._kv.gather_index(torch.tensor(rows, device=device))
        if not any(begins) and min(ends) == num_tokens:
            return index, num_tokens, None
        position = torch.arange(num_tokens, device=device)
        hidden = position >= torch.tensor(ends, device=device).unsqueeze(1)
        hidden |= position < torch.tensor(begins, device=device).unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=self._kv.dtype, device=device).masked_fill_(hidden, float("-inf"))
        return index, num_tokens, mask[:, None, None]


class ChunkSpan:
    """Some new tokens of one sequence.

    Args:
        num_tokens: new ones.
        num_before: tokens of the sequence whose KV is in the pool already.
    """

    def __init__(
        self,
        kv: PagedKV,
        start: int,
        block_table: Sequence[int],
        *,
        num_tokens: int,
        num_before: int,
        masks: CausalMasks,
    ) -> None:
        self.tokens = slice(start, start + num_tokens)
        self._kv = kv
        self._block_table, self._num_tokens, self._num_before = block_table, num_tokens, num_before
        self._masks = masks
        self._indices: dict[int | None, tuple[torch.Tensor, int]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        first = 0
        if self._num_before:
            index, first = self._index(rule.window)
            key, value = self._kv.gather(layer, index, 1)
        window = rule.window if rule.window is not None and rule.window < self._num_before + self._num_tokens else None
        if self._num_before == 0 and window is None:
            return attend(query, key, value, rule, is_causal=True)[0].transpose(0, 1)
        parts = []
        for start in range(0, self._num_tokens, QUERY_SLICE):
            num_queries = min(QUERY_SLICE, self._num_tokens - start)
            end = self._num_before + start + num_queries
            begin = max(first, end - num_queries - window + 1) if window else first
            seen = slice(begin - first, end - first)
            mask = self._masks.get(num_queries, end - begin, window)
            part = query[:, :, start : start + num_queries]
            parts.append(attend(part, key[:, :, seen], value[:, :, seen], rule, mask=mask)[0].transpose(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _index(self, window: int | None) -> tuple[torch.Tensor, int]:
        """Gather index, and the position of the first token that it reads: the first that some query sees."""
        found = self._indices.get(window)
        if found is None:
            block_size = self._kv.block_size
            first_block = max(0, self._num_before - window + 1) // block_size if window else 0
            last_block = -(-(self._num_before + self._num_tokens) // block_size)
            table = torch.tensor([self._block_table[first_block:last_block]], device=self._kv.device)
            found = self._indices[window] = self._kv.gather_index(table), first_block * block_size
        return found
