"""Attention over the paged pool, as transformers calls it.

transformers hands unknown keyword arguments of a forward pass down to the attention function: what attends in a pass
travels as ``paged``, and needs no global, no model edit and no Cache. K arrives rotated. Sequences are packed into one
row of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "splitwise_paged"


class Attender(Protocol):
    """What a forward pass hands to every layer's attention."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """Attend in one layer; called once for each, first to last.

        Args:
            query, key, value: [heads, num_tokens, width]; widths of ``value`` and the others may differ.
        Returns:
            [num_tokens, num_heads, width of ``value``]
        """
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """How a layer attends.

    Attributes:
        window: a token sees itself and the ``window - 1`` before it; all before it when None.
        softcap: scores become ``tanh(score / softcap) * softcap``.
        sinks: [num_heads], a score for each head that takes weight and gives no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Grouped-query attention of equal query lengths.

    Args:
        query: [num_seqs, num_heads, num_queries, head_dim]
        key, value: [num_seqs, num_kv_heads, num_tokens, head_dim]
        mask: added to the scores; broadcasts to [num_seqs, 1, num_queries, num_tokens]
    Returns:
        [num_seqs, num_heads, num_queries, head_dim]
    """
    num_seqs, num_heads, num_queries, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if rule.softcap is not None or rule.sinks is not None:
        return _attend_in_steps(query, key, value, rule, mask=mask, is_causal=is_causal)
    if num_queries == 1:
        # Heads of a group become queries of their KV head: no KV is read twice.
        packed = query.reshape(num_seqs, num_kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=rule.scale)
        return out.reshape(num_seqs, num_heads, 1, head_dim)
    grouped = num_heads != num_kv_heads
    if grouped and query.is_cuda and mask is not None:
        # CUDA's fast kernels take no mask together with grouped heads.
        key, value = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=rule.scale, enable_gqa=grouped
    )


def _attend_in_steps(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    *,
    mask: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    """The same for scores that no fused kernel computes."""
    num_seqs, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_tokens = key.shape[1], key.shape[2]
    packed = query.reshape(num_seqs, num_kv_heads, -1, head_dim)
    scores = (packed @ key.transpose(2, 3)) * rule.scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.view(num_seqs, num_heads, num_queries, num_tokens)
    if is_causal:
        mask = torch.full((num_queries, num_tokens), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    if mask is not None:
        scores = scores + mask
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).view(1, num_heads, 1, 1).expand(num_seqs, -1, num_queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)[..., :num_tokens]
    out = weights.reshape(num_seqs, num_kv_heads, -1, num_tokens) @ value
    return out.view(num_seqs, num_heads, num_queries, head_dim)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: Attender,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that models call in each layer.

    Args:
        query, key, value: [1, heads, num_tokens, width]
        attention_mask: not used: ``paged`` knows what its tokens see.
    Returns:
        [1, num_tokens, num_heads, width of ``value``]
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    return paged.attend(layer, query[0], key[0], value[0], rule).unsqueeze(0), None


def use_paged_attention(model: Any) -> None:
    """Have a transformers model call ``paged_attention``; its forward passes then need the argument ``paged``."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    model.set_attn_implementation(IMPLEMENTATION)
