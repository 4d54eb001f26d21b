"""Test seam: model directories that are made in seconds, offline, and that break when KV is damaged.

Needs the ``engine`` extra.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.transformers.loading import no_progress_bar

VOCAB_SIZE = 1024
MAX_LEN = 2048
SLIDING_WINDOW = 24
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
PAD_ID, BOS_ID, EOS_ID = range(3)
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Recipe:
    """How one architecture is made small.

    Attributes:
        config: its configuration class, by name: importing all of them takes seconds.
    """

    config: str
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_MOE = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
_ALTERNATING = {"sliding_window": SLIDING_WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_RECIPES: Mapping[str, _Recipe] = {
    "llama": _Recipe("LlamaConfig"),
    "qwen2": _Recipe("Qwen2Config"),
    "qwen3": _Recipe("Qwen3Config", {"head_dim": 32}),
    "mistral": _Recipe("MistralConfig", {"sliding_window": SLIDING_WINDOW}),
    "gemma2": _Recipe(
        "Gemma2Config",
        {**_ALTERNATING, "head_dim": 32, "query_pre_attn_scalar": 48, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": _Recipe("Gemma3TextConfig", {**_ALTERNATING, "head_dim": 32, "query_pre_attn_scalar": 48}),
    "mixtral": _Recipe("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": _Recipe("Qwen3MoeConfig", {**_MOE, "num_experts": 4, "head_dim": 32}),
    "phi3": _Recipe("Phi3Config"),
    "gpt-oss": _Recipe(
        "GptOssConfig",
        {
            **_ALTERNATING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek-v3": _Recipe(
        "DeepseekV3Config",
        {
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 48,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
}
ARCHITECTURES = tuple(_RECIPES)


def make_tiny_model(
    arch: str, path: str | Path, *, initializer_range: float = 0.15, seed: int = 0, **overrides: Any
) -> Path:
    """Write a model directory: configuration, random float32 weights, a byte-level BPE tokenizer with a chat template.

    Args:
        arch: one of ``ARCHITECTURES``.
        path: made if it is not there.
        initializer_range: at transformers' 0.02, greedy output hardly notices damaged KV; from 0.1 on it does.
        overrides: fields of the configuration.
    """
    recipe = _RECIPES[arch]
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in _tokenizer_files().items():
        (folder / name).write_bytes(data)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LEN,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": False,
        "initializer_range": initializer_range,
        **recipe.extra,
        **overrides,
    }
    config = getattr(transformers, recipe.config)(**settings)
    auto: Any = transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        _randomize_constants(model, initializer_range)
    model.generation_config.eos_token_id = EOS_ID
    with no_progress_bar():
        model.save_pretrained(folder)
    return folder


def _randomize_constants(model: torch.nn.Module, spread: float) -> None:
    """Sinks and biases are made as zeros, which would hide whether anybody reads them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "bias")):
                parameter.normal_(std=spread)


@lru_cache(maxsize=1)
def _tokenizer_files() -> Mapping[str, bytes]:
    """Trained once a process; the same everywhere with one Python version, on whose sources it is trained."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    tokenizer.train([str(source) for source in sources], trainer)
    fast_class: Any = transformers.PreTrainedTokenizerFast
    fast = fast_class(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=MAX_LEN
    )
    fast.chat_template = CHAT_TEMPLATE
    with tempfile.TemporaryDirectory(prefix="tiny-tokenizer-") as folder:
        fast.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}
