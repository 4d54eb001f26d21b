"""Finding, checking and loading a model. Whatever cannot work is told here, before anything is served."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from engine.transformers.options import TransformersOptions
from splitwise_sched.errors import ConfigError
from splitwise_sched.tokenizer import Tokenizer

# Their attention is causal with at most a window, a cap and sinks, all told to the attention function, and one KV shape
# in all layers. Each is compared with generate(), token by token, in the tests.
ARCHITECTURES = (
    "DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
MAX_JSON_BYTES = 64 << 20
# Rotation that depends on how long the longest sequence of a pass is: the same for all only below the original length.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, and what the engine must know of it.

    Attributes:
        model: a transformers causal LM in evaluation mode.
        max_len: positions that it was made for.
        eos_token_ids: every token that ends its output.
    """

    path: Path
    model: Any
    tokenizer: Tokenizer
    dtype: torch.dtype
    max_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]


def load_model(options: TransformersOptions) -> LoadedModel:
    """Load weights and tokenizer.

    Raises:
        ConfigError: says what is missing or does not fit, and what to do.
    """
    path = find_model(options.model)
    config = check_model_dir(path)
    tokenizer = Tokenizer.from_pretrained_dir(path)
    _check_vocabulary(path, config, tokenizer)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device {options.device!r}: torch sees no CUDA device here; use device 'cpu'")
    model = _load_weights(path, options)
    text_config = model.config.get_text_config()
    return LoadedModel(
        path=path,
        model=model,
        tokenizer=tokenizer,
        dtype=model.dtype,
        max_len=_max_len(text_config),
        vocab_size=int(text_config.vocab_size),
        eos_token_ids=_eos_token_ids(model),
    )


def find_model(name: str) -> Path:
    """The directory of a model: ``name`` itself, or where the hub's files of that id were downloaded to."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"model {name!r} is a file: give the directory that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"model directory {name!r} does not exist: check the path, or give the id of a hub model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_DOWNLOADED)))
    except Exception as exc:  # the hub client passes on errors of its HTTP library, which differs by version
        raise ConfigError(
            f"model {name!r} is not a directory here, and could not be fetched from the hub "
            f"({' '.join(str(exc).split())}): check its spelling, or give the path of a model directory"
        ) from exc


def check_model_dir(path: Path) -> Mapping[str, Any]:
    """What can be told before weights are read; returns the configuration.

    Raises:
        ConfigError: no config.json, an architecture that this engine cannot run, or weights that are not there.
    """
    if not (path / "config.json").is_file():
        raise ConfigError(f"{str(path)!r} has no config.json: give the directory that a model was saved into")
    config = _read_json(path / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not any(a in ARCHITECTURES for a in architectures):
        raise ConfigError(
            f"architecture {', '.join(map(str, architectures or ['(none given)']))} of {str(path)!r} is not supported: "
            "this engine knows decoders whose layers all keep K and V of one shape; they are "
            + ", ".join(ARCHITECTURES)
        )
    _check_weights(path)
    return config


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index} has no weight_map: download the model again")
        missing = sorted({name for name in map(str, weight_map.values()) if not (path / Path(name).name).is_file()})
        if missing:
            raise ConfigError(f"{str(path)!r} lacks the weights {', '.join(missing[:8])}: download the model again")
    elif not (path / "model.safetensors").is_file():
        remedy = "download the model again"
        if any(path.glob("*.bin")) or any(path.glob("*.pth")):
            remedy = "pickled weights are not loaded; save it again with transformers: model.save_pretrained(...)"
        raise ConfigError(f"{str(path)!r} has no weights (model.safetensors): {remedy}")


def _check_vocabulary(path: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    vocab_size = config.get("vocab_size")
    if isinstance(vocab_size, int) and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"tokenizer and model in {str(path)!r} do not belong together: the tokenizer has {tokenizer.vocab_size} "
            f"tokens, the model's embedding {vocab_size} rows; take both from one source"
        )


def _load_weights(path: Path, options: TransformersOptions) -> Any:
    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    auto: Any = transformers.AutoModelForCausalLM
    try:
        with no_progress_bar():
            model, report = auto.from_pretrained(
                path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as exc:
        raise ConfigError(f"the model in {str(path)!r} cannot be loaded: {exc}") from exc
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ConfigError(
            f"the weights in {str(path)!r} lack {len(missing)} tensors ({', '.join(missing[:4])} ...): download the "
            "model again, or check that config.json is its own"
        )
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"the model in {str(path)!r} is {model.dtype}: choose a dtype of float32, bfloat16, float16")
    return model.eval().requires_grad_(False).to(options.device)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing on the terminal."""
    logging: Any = transformers.utils.logging
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _max_len(config: Any) -> int:
    limit = int(config.max_position_embeddings)
    for rope in _rope_parameters(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or limit
            limit = min(limit, int(original))
    return limit


def _rope_parameters(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One set, or one for each type of layer."""
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def _eos_token_ids(model: Any) -> frozenset[int]:
    found: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config()):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            found.update([eos] if isinstance(eos, int) else eos)
            break
    return frozenset(found)


def _read_json(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_JSON_BYTES} bytes, which no such file should be")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not readable JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not an object")
    return value
