"""The engine itself: a forward pass over the paged pool a step, batching as in ``engine.batching``."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from engine.batching.draws import Sampled
from engine.batching.engine import BatchingEngine, Work, draw_of
from engine.batching.sequence import Sequence
from engine.port import EngineSpec
from engine.transformers.attention import use_paged_attention
from engine.transformers.batch import build_batch
from engine.transformers.loading import load_model
from engine.transformers.options import TransformersOptions
from engine.transformers.pool import allocate_pool
from engine.transformers.probe import probe_kv_shape
from engine.transformers.sampler import sample
from engine.transformers.spans import CausalMasks
from kv_transfer.layout import KVLayout
from kv_transfer.pool import BlockPool
from kv_transfer.transports.cuda_ipc.pool import CudaPool


class TransformersEngine(BatchingEngine):
    """See ``EngineDriver`` for the life of a request."""

    def __init__(self, options: TransformersOptions) -> None:
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        loaded = load_model(options)
        self._model: Any = loaded.model
        use_paged_attention(self._model)
        self._pool = allocate_pool(options, loaded, probe_kv_shape(self._model))
        self._kv = self._pool.kv
        self._masks = CausalMasks(self._kv.dtype, self._kv.device)
        spec = EngineSpec(
            model=options.served_model_name or options.model,
            max_model_len=self._pool.max_model_len,
            num_blocks=self._pool.layout.num_blocks,
            block_size=options.block_size,
            max_num_seqs=options.max_num_seqs,
            vocab_size=loaded.vocab_size,
        )
        super().__init__(
            spec,
            max_num_batched_tokens=options.max_num_batched_tokens,
            eos_token_ids=loaded.eos_token_ids,
            texts=loaded.tokenizer,
        )

    @property
    def kv_layout(self) -> KVLayout:
        return self._pool.layout

    @property
    def kv_pools(self) -> SequenceOf[BlockPool]:
        """Empty where a mixed instance is on a GPU, and the host has not what it takes to share its memory."""
        return self._pool.shared

    @torch.inference_mode()
    def _compute(self, work: Work) -> SequenceOf[tuple[Sequence, Sampled | None]]:
        batch = build_batch(self._kv, work, self._masks)
        for pool in self._pool.shared:
            if isinstance(pool, CudaPool):
                pool.begin_pass()
        logits = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.last_index,
            paged=batch.paged,
        ).logits[0]
        if not batch.finishing:
            return []
        return list(zip(batch.finishing, sample(logits, [draw_of(s) for s in batch.finishing]), strict=True))

    def _wipe(self, sequence: Sequence) -> None:
        self._kv.clear(sequence.blocks)

    def close(self) -> None:
        super().close()
        # Whoever still holds the engine must not keep the weights alive by it.
        self._model = None
        self._pool.close()
