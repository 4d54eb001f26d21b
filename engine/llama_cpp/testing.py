"""Test seam: GGUF files from the tiny model directories of ``engine.testing``. Needs the ``gguf`` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# llama.cpp looks its activation up in a table of half precision, so that its tokens are not those of transformers.
SLIDING_WINDOW_ARCHITECTURE = "gemma2"
_NORMAL_TOKEN, _CONTROL_TOKEN = 1, 3


def make_tiny_gguf(model_dir: Path, path: Path | None = None) -> Path:
    """Write the model of a directory that ``make_tiny_model`` made as float32 GGUF.

    Args:
        model_dir: of one of ``ARCHITECTURES``; or of ``SLIDING_WINDOW_ARCHITECTURE``, with tied embeddings.
        path: of the file; ``model.gguf`` in the directory when None.
    """
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    arch, num_layers = config["model_type"], config["num_hidden_layers"]
    path = path or model_dir / "model.gguf"
    writer: Any = gguf.GGUFWriter(str(path), arch)
    _add_shape(writer, config)
    _add_tokenizer(writer, config, json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8")))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), num_layers)
    for name, tensor in load_file(str(model_dir / "model.safetensors")).items():
        data = tensor.astype(np.float32)
        if arch == "llama" and "q_proj" in name:
            data = _interleave(data, config["num_attention_heads"])
        elif arch == "llama" and "k_proj" in name:
            data = _interleave(data, config["num_key_value_heads"])
        elif arch == "gemma2" and name.endswith("norm.weight"):
            data = data + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "gemma2":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _add_tokenizer(writer: Any, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    tokens = [f"<unused {i}>" for i in range(config["vocab_size"])]
    types = [_NORMAL_TOKEN] * len(tokens)
    for text, token_id in tokenizer["model"]["vocab"].items():
        tokens[token_id] = text
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL_TOKEN
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _interleave(weights: Any, num_heads: int) -> Any:
    """Rows of each head from halves, as transformers rotates, to pairs, as llama.cpp does for this architecture."""
    rows = weights.shape[0]
    return weights.reshape(num_heads, 2, rows // num_heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
