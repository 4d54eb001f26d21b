"""The reference engine: continuous batching over a paged KV pool that we own, on Hugging Face causal LMs.

Importing this package does not import torch; ``create`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.transformers.options import TransformersOptions

if TYPE_CHECKING:
    from engine.transformers.engine import TransformersEngine

__all__ = ["TransformersOptions", "create"]


def create(options: TransformersOptions) -> TransformersEngine:
    """Load the model and allocate its KV pool; the caller owns the engine and closes it.

    Raises:
        ConfigError: the model directory or an option cannot work; the message says which, and what to do.
    """
    try:
        from engine.transformers.engine import TransformersEngine
    except ModuleNotFoundError as exc:
        if exc.name not in {"torch", "transformers", "tokenizers", "safetensors"}:
            raise
        from splitwise_sched.errors import ConfigError

        raise ConfigError(
            f"the transformers engine needs {exc.name}, which is not installed: pip install 'splitwise-sched[engine]'"
        ) from exc
    return TransformersEngine(options)
