"""Settings of the transformers engine."""

from __future__ import annotations

from dataclasses import dataclass

from splitwise_sched.errors import ConfigError
from splitwise_sched.types import Role

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_KV_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersOptions:
    """What a transformers engine is started with. Checked on construction (ConfigError names the option).

    Attributes:
        model: a model directory, or a Hugging Face hub id.
        served_model_name: the name that requests ask for; ``model`` when None.
        role: prefill and decode need a pool that other processes can reach: on a GPU, cupy. Mixed does not.
        dtype: of weights and KV; ``auto`` takes the model's own.
        device: ``cpu``, ``cuda`` or ``cuda:<n>``.
        block_size: tokens in a KV block.
        num_blocks: of the KV pool; give this or ``kv_memory_bytes``, not both.
        kv_memory_bytes: size of the KV pool; 1 GiB when neither is given.
        max_num_seqs: sequences in one forward pass, at most.
        max_num_batched_tokens: tokens in one forward pass, at most; longer prompts run in chunks.
        max_model_len: prompt and output tokens together; what model and pool allow when None.
        num_threads: CPU threads of torch, for the whole process; torch's own choice when None.
    """

    model: str
    served_model_name: str | None = None
    role: Role = Role.MIXED
    dtype: str = "auto"
    device: str = "cpu"
    block_size: int = 16
    num_blocks: int | None = None
    kv_memory_bytes: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        def refuse(name: str, must: str) -> None:
            raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be {must}")

        if not self.model:
            refuse("model", "a model directory or a hub id")
        if self.dtype not in DTYPES:
            refuse("dtype", f"one of {', '.join(DTYPES)}")
        if self.device != "cpu" and self.device.split(":")[0] != "cuda":
            refuse("device", "cpu, cuda or cuda:<number>")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                refuse(name, "1 or more")
        for name in ("num_blocks", "kv_memory_bytes", "max_model_len", "num_threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                refuse(name, "1 or more")
        if self.num_blocks is not None and self.kv_memory_bytes is not None:
            raise ConfigError(
                f"num_blocks ({self.num_blocks}) and kv_memory_bytes ({self.kv_memory_bytes}) are both given: "
                "each sets the size of the KV pool; give one of them"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            refuse("max_num_batched_tokens", f"at least max_num_seqs ({self.max_num_seqs}): each needs a token a pass")
