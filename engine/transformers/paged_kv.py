"""The KV pool as torch sees it: rows of tokens are written to it, blocks gathered from it, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

PLANES = 2


class PagedKV:
    """Views of a KV pool.

    Args:
        storage: all of the pool, flat, in the pool's dtype.
        head_dim: width of a head in the pool; both K and V are padded to it.
        packing: ``block-major`` [block][layer][K, V][token][head][head_dim], in which a block is one contiguous run,
            or ``layer-major`` [layer][K, V][block][token][head][head_dim].
        on_layer: called when what writes a layer of a pass has been launched.
    """

    def __init__(
        self,
        storage: torch.Tensor,
        *,
        num_blocks: int,
        num_layers: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        packing: str = "block-major",
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = storage.dtype
        self.device = storage.device
        self._storage = storage
        self._on_layer = on_layer
        # Strides in units of (block, layer, plane) rows.
        if packing == "block-major":
            self._block, self._layer, self._plane = num_layers * PLANES, PLANES, 1
        else:
            self._block, self._layer, self._plane = 1, PLANES * num_blocks, num_blocks
        rows = storage.view(num_blocks * num_layers * PLANES, block_size * num_kv_heads * head_dim)
        tokens = storage.view(-1, num_kv_heads * head_dim)
        # A view that begins at a layer's first row takes the same indices for every layer.
        starts = [layer * self._layer for layer in range(num_layers)]
        self._layers = [rows[start:] for start in starts]
        self._k_tokens = [tokens[start * block_size :] for start in starts]
        self._v_tokens = [tokens[(start + self._plane) * block_size :] for start in starts]
        self._scratch = storage.new_empty(0)

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return PLANES * self.num_kv_heads * self.head_dim * self._storage.element_size()

    def write_index(self, block_ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Where tokens go, for ``write``: [num_tokens], from their blocks and positions within them."""
        return block_ids * (self._block * self.block_size) + offsets

    def gather_index(self, block_table: torch.Tensor) -> torch.Tensor:
        """Which blocks ``gather`` reads: [2 * num_seqs * num_blocks], from a table [num_seqs, num_blocks]."""
        first = block_table.flatten() * self._block
        return torch.cat([first, first + self._plane])

    def write(self, layer: int, index: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store K and V of new tokens; ``key`` and ``value``: [num_tokens, num_kv_heads, head_dim]."""
        self._k_tokens[layer].index_copy_(0, index, key.reshape(len(index), -1))
        self._v_tokens[layer].index_copy_(0, index, value.reshape(len(index), -1))
        if self._on_layer is not None:
            self._on_layer(layer)

    def gather(self, layer: int, index: torch.Tensor, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of blocks, one after the other: each [num_seqs, num_kv_heads, num_tokens, head_dim].

        They are valid until the next call, which writes over them.
        """
        rows = self._layers[layer]
        width = rows.shape[1]
        if self._scratch.numel() < len(index) * width:
            self._scratch = rows.new_empty(len(index) * width)
        out = self._scratch[: len(index) * width].view(len(index), width)
        torch.index_select(rows, 0, index, out=out)
        both = out.view(PLANES, num_seqs, -1, self.num_kv_heads, self.head_dim).transpose(2, 3)
        return both[0], both[1]

    def close(self) -> None:
        """Let go of the pool's memory; nothing may be read or written after."""
        self._storage = self._scratch = self._storage.new_empty(0)
        self._layers, self._k_tokens, self._v_tokens = [], [], []

    def clear(self, block_ids: list[int]) -> None:
        """Zero blocks in all layers."""
        index = torch.tensor(block_ids, device=self.device)
        rows = self._layers[0]
        for layer in range(len(self._layers)):
            for plane in range(PLANES):
                rows.index_fill_(0, index * self._block + layer * self._layer + plane * self._plane, 0)
