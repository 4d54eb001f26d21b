"""The C library: found, its version and structs checked, its functions typed.

The structs are those of one llama.h. They have no version and no size of their own, so that the wheel is pinned, and
what the library gives as defaults is compared with what these structs read: a field too many or too few would show.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import logging
from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from typing import Any

from splitwise_sched.errors import ConfigError

logger = logging.getLogger("engine.llama_cpp")

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"
REMEDY = "pip install 'splitwise-sched[llama-cpp]'"
# llama.cpp has one more, which carries KV in and out.
MAX_SEQUENCES = 255
FLASH_ATTENTION_OFF = 0
_ERROR_LEVEL, _WARNING_LEVEL = 4, 3


class ModelParams(c.Structure):
    _fields_ = (
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int),
        ("load_mode", c.c_int),
        ("lazy_mode", c.c_int),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("mtp", c.c_bool),
    )


class ContextParams(c.Structure):
    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int),
        ("rope_scaling_type", c.c_int),
        ("pooling_type", c.c_int),
        ("attention_type", c.c_int),
        ("flash_attn_type", c.c_int),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int),
        ("type_v", c.c_int),
        ("moe_size", c.c_size_t),
        ("abort_callback", c.c_void_p),
        ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    )


class Batch(c.Structure):
    """Tokens of one ``llama_decode``; all pointers are to arrays of ``n_tokens``, except ``embd``, which is null."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.c_void_p),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.c_void_p),
    )


_MODEL_DEFAULTS: Mapping[str, Any] = {
    "devices": None,
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "mtp": False,
}
_CONTEXT_DEFAULTS: Mapping[str, Any] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_seq": 1,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "type_k": 1,
    "type_v": 1,
    "moe_size": 0,
    "abort_callback": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}
_p, _i32, _size = c.c_void_p, c.c_int32, c.c_size_t
_FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_p, _p)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (_p, (c.c_char_p, ModelParams)),
    "llama_model_free": (None, (_p,)),
    "llama_model_get_vocab": (_p, (_p,)),
    "llama_model_n_ctx_train": (_i32, (_p,)),
    "llama_model_n_swa": (_i32, (_p,)),
    "llama_model_is_recurrent": (c.c_bool, (_p,)),
    "llama_model_is_hybrid": (c.c_bool, (_p,)),
    "llama_model_has_encoder": (c.c_bool, (_p,)),
    "llama_init_from_model": (_p, (_p, ContextParams)),
    "llama_free": (None, (_p,)),
    "llama_n_ctx": (c.c_uint32, (_p,)),
    "llama_get_memory": (_p, (_p,)),
    "llama_memory_clear": (None, (_p, c.c_bool)),
    "llama_memory_seq_rm": (c.c_bool, (_p, _i32, _i32, _i32)),
    "llama_memory_seq_cp": (None, (_p, _i32, _i32, _i32, _i32)),
    "llama_memory_seq_pos_min": (_i32, (_p, _i32)),
    "llama_memory_seq_pos_max": (_i32, (_p, _i32)),
    "llama_decode": (_i32, (_p, Batch)),
    "llama_get_logits_ith": (c.POINTER(c.c_float), (_p, _i32)),
    "llama_state_seq_get_size": (_size, (_p, _i32)),
    "llama_state_seq_get_data": (_size, (_p, _p, _size, _i32)),
    "llama_state_seq_set_data": (_size, (_p, _p, _size, _i32)),
    "llama_vocab_n_tokens": (_i32, (_p,)),
    "llama_vocab_type": (c.c_int, (_p,)),
    "llama_vocab_is_eog": (c.c_bool, (_p, _i32)),
    "llama_vocab_is_control": (c.c_bool, (_p, _i32)),
    "llama_token_to_piece": (_i32, (_p, _i32, _p, _i32, _i32, c.c_bool)),
}
_LOG_CALLBACK = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)


class Library:
    """``api`` has the functions by their C names; ``complaints`` are the last errors that the library has logged."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self.complaints: deque[str] = deque(maxlen=4)
        self._callback = _LOG_CALLBACK(self._on_log)
        api.llama_log_set(c.cast(self._callback, c.c_void_p), None)
        api.llama_backend_init()

    def last_complaint(self) -> str:
        """What the library said last, for an error of ours; "" when it has said nothing."""
        return "; ".join(self.complaints)

    def _on_log(self, level: int, text: bytes, user_data: object) -> None:
        if level in (_ERROR_LEVEL, _WARNING_LEVEL) and (line := text.decode(errors="replace").strip()):
            logger.debug("%s", line)
            if level == _ERROR_LEVEL:
                self.complaints.append(line[:500])


@lru_cache(maxsize=1)
def load_library() -> Library:
    """Once a process.

    Raises:
        ConfigError: the wheel is not installed, is another version, or its structs are not the ones known here.
    """
    try:
        version = metadata.version(PACKAGE)
        found = importlib.util.find_spec(f"{PACKAGE}.{PACKAGE}")
    except (metadata.PackageNotFoundError, ModuleNotFoundError) as exc:
        raise ConfigError(f"the llama_cpp engine needs {PACKAGE} {VERSION}, which is not installed: {REMEDY}") from exc
    check_version(version)
    if found is None or found.origin is None:
        raise ConfigError(f"{PACKAGE} {version} is installed without its library: install it again, {REMEDY}")
    try:
        api = c.CDLL(found.origin)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(api, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as exc:
        raise ConfigError(f"{PACKAGE} {version} cannot be used on this machine: {exc}") from exc
    check_defaults(api.llama_model_default_params(), _MODEL_DEFAULTS)
    check_defaults(api.llama_context_default_params(), _CONTEXT_DEFAULTS)
    return Library(api)


def check_version(version: str) -> None:
    """Raises ConfigError when these are not the structs of that version."""
    if version != VERSION:
        raise ConfigError(
            f"{PACKAGE} {version} is installed, and this engine works with {VERSION} alone, whose C structs it knows: "
            f"{REMEDY}"
        )


def check_defaults(params: c.Structure, expected: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the first field that does not read as it should."""
    for name, value in expected.items():
        if getattr(params, name) != value:
            raise ConfigError(
                f"{PACKAGE}'s {type(params).__name__}.{name} reads as {getattr(params, name)!r} where {VERSION} has "
                f"{value!r}: the installed library is another build; {REMEDY}"
            )
