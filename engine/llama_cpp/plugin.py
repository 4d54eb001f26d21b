"""How ``serve`` and the conformance suite get a llama.cpp engine."""

from __future__ import annotations

from pathlib import Path

from engine.llama_cpp.library import MAX_SEQUENCES
from engine.plugins import EnginePlugin
from engine.port import EngineDriver
from engine.settings import EngineSettings
from splitwise_sched.errors import ConfigError
from splitwise_sched.types import Role

DEFAULT_KV_MEMORY_MB = 1024


class LlamaCppPlugin(EnginePlugin):
    def create(self, settings: EngineSettings, role: Role) -> EngineDriver:
        from engine.llama_cpp.engine import LlamaCppEngine, LlamaCppOptions
        from engine.llama_cpp.model import load_model

        _check(settings)
        # llama.cpp's own choice, whatever the weights are.
        dtype = "float16" if settings.dtype == "auto" else settings.dtype
        model = load_model(settings.model, dtype)
        try:
            num_blocks = settings.num_gpu_blocks_override
            if num_blocks is None:
                # As much again is for KV that moves.
                budget = ((settings.kv_memory_mb or DEFAULT_KV_MEMORY_MB) << 20) // 2
                longest = settings.max_num_seqs * min(settings.max_model_len or model.max_len, model.max_len)
                num_tokens = min(budget // model.state_bytes[1], longest)
                num_blocks = max(1, num_tokens // settings.block_size)
            options = LlamaCppOptions(
                served_model_name=settings.served_model_name or settings.model,
                dtype=dtype,
                block_size=settings.block_size,
                num_blocks=num_blocks,
                max_model_len=_max_model_len(settings, model.max_len, num_blocks * settings.block_size),
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                num_threads=settings.num_threads,
            )
        except BaseException:
            model.close()
            raise
        return LlamaCppEngine(model, options)

    def tiny_model(self, folder: Path) -> str:
        from engine.llama_cpp.library import load_library

        load_library()
        try:
            from engine.llama_cpp.testing import make_tiny_gguf
            from engine.testing import make_tiny_model
        except ModuleNotFoundError as exc:
            raise ConfigError(f"{exc.name} is not installed: pip install 'splitwise-sched[dev]'") from exc
        return str(make_tiny_gguf(make_tiny_model("llama", folder)))

    def tokenizer_dir(self, settings: EngineSettings) -> Path | None:
        """Where a tokenizer.json lies beside the GGUF file."""
        folder = Path(settings.model).resolve().parent
        return folder if (folder / "tokenizer.json").is_file() else None


def _check(settings: EngineSettings) -> None:
    if settings.device != "cpu":
        raise ConfigError(f"--device {settings.device}: the llama_cpp engine runs on the cpu alone")
    if settings.max_num_seqs > MAX_SEQUENCES:
        raise ConfigError(f"--max-num-seqs {settings.max_num_seqs}: llama.cpp has room for {MAX_SEQUENCES} at most")
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens} is less than --max-num-seqs "
            f"{settings.max_num_seqs}: each sequence needs a token a pass"
        )
    if settings.num_gpu_blocks_override is not None and settings.kv_memory_mb is not None:
        raise ConfigError("--num-gpu-blocks-override and --kv-memory-mb each set the size of the KV: give one of them")


def _max_model_len(settings: EngineSettings, made_for: int, capacity: int) -> int:
    wanted = settings.max_model_len
    if wanted is None:
        return min(made_for, capacity)
    if wanted > made_for:
        raise ConfigError(f"--max-model-len {wanted}: {settings.model} was made for {made_for} at most")
    if wanted > capacity:
        raise ConfigError(f"--max-model-len {wanted}: the KV holds {capacity} tokens; raise --kv-memory-mb")
    return wanted
