"""What the dimensions of vLLM's KV tensors, one a layer, mean. Pure: it looks at shapes alone.

CPU                 [num_blocks, heads, tokens, K|V]             packed by the kernels inside of (block, head)
FlashAttention ...  [2, num_blocks, tokens, heads, head_dim]     K and V apart; NHD or HND by strides
FlashInfer ...      [num_blocks, 2, tokens, heads, head_dim]
MLA                 [num_blocks, tokens, latent]
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.layout import KVLayout
from splitwise_sched.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """
    Attributes:
        fingerprint: of the model's configuration.
        dtype: of the KV, as kv_transfer spells it.
        num_kv_heads: of the whole model, over all ranks.
    """

    engine: str
    fingerprint: str
    dtype: str
    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    tp_size: int
    tp_rank: int


def layout_of(model: ModelShape, shape: tuple[int, ...]) -> tuple[KVLayout, tuple[str, ...]]:
    """The layout of a rank whose layers' tensors have this shape, and the names of its dimensions (TensorPool).

    Raises:
        ConfigError: it is not one of those above, or not in blocks of the scheduler's size.
    """
    blocks = model.num_blocks
    names: tuple[str, ...]
    if len(shape) == 4 and shape[0] == blocks:
        axes, planes, names = "head", 1, ("block", "head", "token", "dim")
    elif len(shape) == 5 and shape[:2] == (2, blocks):
        axes, planes, names = "token+head", 2, ("plane", "block", "token", "head", "dim")
    elif len(shape) == 5 and shape[:2] == (blocks, 2):
        axes, planes, names = "token+head", 2, ("block", "plane", "token", "head", "dim")
    elif len(shape) == 3 and shape[0] == blocks:
        axes, planes, names = "token", 1, ("block", "token", "dim")
    else:
        raise ConfigError(
            f"the KV cache of a layer has shape {shape} with {blocks} blocks, which this connector does not know: it "
            "knows the CPU, FlashAttention, FlashInfer and MLA layouts"
        )
    num_tokens = shape[names.index("token")]
    if num_tokens != model.block_size:
        raise ConfigError(
            f"vLLM's kernels use blocks of {num_tokens} tokens where its scheduler uses {model.block_size}: set "
            f"--block-size {num_tokens}"
        )
    layout = KVLayout(
        engine=model.engine,
        model=model.fingerprint,
        dtype=model.dtype,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads if "head" in names else 1,
        head_dim=shape[-1],
        block_size=model.block_size,
        num_blocks=blocks,
        tp_size=model.tp_size,
        tp_rank=model.tp_rank,
        kv_planes=planes,
        axes=axes,
        opaque_format=model.engine,
    )
    return layout, names
