"""Sizing and allocating the KV pool of one engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from engine.batching.blocks import num_blocks_for
from engine.transformers.fingerprint import fingerprint
from engine.transformers.loading import LoadedModel
from engine.transformers.options import DEFAULT_KV_MEMORY_BYTES, TransformersOptions
from engine.transformers.paged_kv import PagedKV
from engine.transformers.probe import KVShape
from kv_transfer.errors import InvalidLayout, KVTransferError, TransportFailed
from kv_transfer.layout import KVLayout
from kv_transfer.memory import KVPool
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from splitwise_sched.errors import ConfigError
from splitwise_sched.types import Role

log = logging.getLogger(__name__)


@dataclass(slots=True)
class EnginePool:
    """The pool and its views; closed with the engine.

    Attributes:
        shared: the pool as peers reach it; empty on a GPU that nobody can be let into, for want of cupy.
        max_model_len: tokens of one sequence, at most.
    """

    layout: KVLayout
    kv: PagedKV
    shared: tuple[KVPool | CudaPool, ...]
    max_model_len: int

    def close(self) -> None:
        """Drop the views, then the memory. Idempotent."""
        self.kv.close()
        for pool in self.shared:
            pool.close()


def allocate_pool(options: TransformersOptions, loaded: LoadedModel, shape: KVShape) -> EnginePool:
    """Allocate the KV pool.

    Raises:
        ConfigError: there is not so much memory, or the pool and ``max_model_len`` do not fit.
    """
    try:
        layout = KVLayout(
            engine="transformers",
            model=fingerprint(loaded.path),
            dtype=str(loaded.dtype).removeprefix("torch."),
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=options.block_size,
            num_blocks=options.num_blocks or 1,
        )
        if options.num_blocks is None:
            budget = options.kv_memory_bytes or DEFAULT_KV_MEMORY_BYTES
            # More than every sequence at its longest could use would never be touched.
            most = options.max_num_seqs * num_blocks_for(options.max_model_len or loaded.max_len, options.block_size)
            layout = replace(layout, num_blocks=max(1, min(budget // layout.block_bytes, most)))
    except InvalidLayout as exc:
        raise ConfigError(f"no KV pool of {options.num_blocks} blocks: {exc}; lower kv_memory_bytes") from exc
    max_model_len = _max_model_len(options, loaded, layout)
    shared: list[KVPool | CudaPool] = []
    try:
        if options.device == "cpu":
            pool = KVPool.allocate(layout)
            shared.append(pool)
            storage = torch.frombuffer(pool.buffer, dtype=loaded.dtype)
        else:
            memory = torch.zeros(layout.pool_bytes, dtype=torch.uint8, device=options.device)
            shared += _shared_on_device(options, layout, memory)
            storage = memory.view(loaded.dtype)
    except (KVTransferError, torch.OutOfMemoryError) as exc:
        raise ConfigError(f"no KV pool of {layout.num_blocks} blocks: {exc}; lower kv_memory_bytes") from exc
    kv = PagedKV(
        storage,
        num_blocks=layout.num_blocks,
        num_layers=layout.num_layers,
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        packing=layout.packing,
        on_layer=shared[0].layer_done if shared and isinstance(shared[0], CudaPool) else None,
    )
    return EnginePool(layout, kv, tuple(shared), max_model_len)


def _shared_on_device(options: TransformersOptions, layout: KVLayout, memory: torch.Tensor) -> list[CudaPool]:
    """The pool as other processes reach it; none for a mixed instance on a host that cannot share it."""
    device = memory.device

    def stream() -> int:
        return int(torch.cuda.current_stream(device).cuda_stream)

    try:
        return [CudaPool.of_tensors(layout, [memory], stream=stream)]
    except TransportFailed as exc:
        if options.role is not Role.MIXED:
            raise ConfigError(f"role {options.role.value!r} on device {options.device!r}: {exc}") from exc
        log.warning("KV blocks on %s stay where they are, as no peer can be let in: %s", options.device, exc)
        return []


def _max_model_len(options: TransformersOptions, loaded: LoadedModel, layout: KVLayout) -> int:
    capacity = layout.num_blocks * layout.block_size
    wanted = options.max_model_len
    if wanted is None:
        return min(loaded.max_len, capacity)
    if wanted > loaded.max_len:
        raise ConfigError(f"max_model_len is {wanted}: {str(loaded.path)!r} was made for {loaded.max_len} at most")
    if wanted > capacity:
        raise ConfigError(
            f"max_model_len is {wanted}: the KV pool of {layout.num_blocks} blocks holds {capacity} tokens; raise "
            "num_blocks or kv_memory_bytes, or lower max_model_len"
        )
    return wanted
