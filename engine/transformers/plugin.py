"""How ``serve`` and the conformance suite get a transformers engine."""

from __future__ import annotations

from pathlib import Path

from engine.plugins import EnginePlugin
from engine.port import EngineDriver
from engine.settings import EngineSettings
from engine.transformers import TransformersOptions, create
from splitwise_sched.errors import ConfigError
from splitwise_sched.types import Role


class TransformersPlugin(EnginePlugin):
    def create(self, settings: EngineSettings, role: Role) -> EngineDriver:
        return create(
            TransformersOptions(
                model=settings.model,
                served_model_name=settings.served_model_name,
                role=role,
                dtype=settings.dtype,
                device=settings.device,
                block_size=settings.block_size,
                num_blocks=settings.num_gpu_blocks_override,
                kv_memory_bytes=None if settings.kv_memory_mb is None else settings.kv_memory_mb << 20,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_model_len=settings.max_model_len,
                num_threads=settings.num_threads,
            )
        )

    def tiny_model(self, folder: Path) -> str:
        try:
            from engine.testing import make_tiny_model
        except ModuleNotFoundError as exc:
            raise ConfigError(f"{exc.name} is not installed: pip install 'splitwise-sched[engine]'") from exc
        return str(make_tiny_model("llama", folder))
