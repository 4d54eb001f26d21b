"""What K and V look like in a model, found by asking it: configurations name these sizes in too many ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.transformers.attention import Rule
from splitwise_sched.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KVShape:
    """``head_dim`` is the wider one of K and V."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


class _Recorder:
    """Notes the shapes that each layer attends with, and attends to nothing."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        self.shapes[layer] = (key.shape[0], max(key.shape[-1], value.shape[-1]))
        return value.new_zeros(query.shape[1], query.shape[0], value.shape[-1])


@torch.inference_mode()
def probe_kv_shape(model: Any) -> KVShape:
    """Run one token through a model that uses paged attention.

    Raises:
        ConfigError: its layers differ, or do not attend through this engine.
    """
    recorder = _Recorder()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=token, position_ids=token, use_cache=False, paged=recorder)
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    shapes = set(recorder.shapes.values())
    if len(shapes) != 1 or sorted(recorder.shapes) != list(range(num_layers)):
        raise ConfigError(
            f"{type(model).__name__} cannot be served: of its {num_layers} layers, {len(recorder.shapes)} attend "
            f"through this engine, with {len(shapes)} different shapes of K and V; all must, with one shape"
        )
    num_kv_heads, head_dim = shapes.pop()
    return KVShape(num_layers, num_kv_heads, head_dim)
