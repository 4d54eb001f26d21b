"""The engine: batching as in ``engine.batching``, computing and KV in a llama.cpp context.

llama.cpp keeps KV where nobody else can reach it. So blocks of the scheduler are accounts here, which keep the context
from overflowing, and what peers read and write are blocks of a second pool: a prefill run's KV is copied out chunk by
chunk, each a sealed piece that begins with a block, and a decode run's copied in when all of it has come.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from engine.batching.blocks import BlockAllocator, num_blocks_for
from engine.batching.draws import Sampled
from engine.batching.engine import BatchingEngine, Work, draw_of
from engine.batching.sampler import choose
from engine.batching.sequence import Sequence
from engine.errors import KVRejected
from engine.llama_cpp.blob import HEADER_BYTES, ByteArray, Progress, Unsealed, beginning, seal, unseal
from engine.llama_cpp.context import Context, Tokens
from engine.llama_cpp.library import VERSION
from engine.llama_cpp.model import LoadedModel
from engine.port import BlocksReady, EngineEvent, EngineSpec, Mode
from kv_transfer.errors import KVTransferError
from kv_transfer.layout import KVLayout
from kv_transfer.memory import KVPool
from splitwise_sched.errors import ConfigError
from splitwise_sched.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppOptions:
    """
    Attributes:
        num_blocks: tokens of the context, in blocks.
        dtype: of KV.
    """

    served_model_name: str
    dtype: str
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_threads: int | None


@dataclass(slots=True)
class _Place:
    """Where a sequence is.

    Attributes:
        seq_id: its number in the context; None when its KV has left it.
        block_ids: of the pool, while KV is on its way.
        sealed: how much of a prefill run's KV lies there.
    """

    seq_id: int | None
    block_ids: list[int]
    sealed: Progress


class LlamaCppEngine(BatchingEngine):
    """Owns the model; see ``EngineDriver`` for the life of a request.

    The pool's first half is for KV that goes out, its second for KV that comes in, so that neither can keep the other
    from moving; each holds the longest request.
    """

    def __init__(self, model: LoadedModel, options: LlamaCppOptions) -> None:
        """Raises ConfigError; the model is freed then."""
        self._model = model
        self._context: Context | None = None
        self._pool: KVPool | None = None
        try:
            self._allocate(model, options)
        except BaseException:
            self._close()
            raise
        spec = EngineSpec(
            model=options.served_model_name,
            max_model_len=options.max_model_len,
            num_blocks=options.num_blocks,
            block_size=options.block_size,
            max_num_seqs=options.max_num_seqs,
            vocab_size=model.vocabulary.size,
        )
        super().__init__(
            spec,
            max_num_batched_tokens=options.max_num_batched_tokens,
            eos_token_ids=model.vocabulary.end_token_ids(),
            texts=model.vocabulary if model.vocabulary.has_texts else None,
        )
        self._places: dict[str, _Place] = {}
        self._seq_ids = list(range(options.max_num_seqs - 1, -1, -1))
        self._must_clear = False

    def _allocate(self, model: LoadedModel, options: LlamaCppOptions) -> None:
        fixed, per_token = model.state_bytes
        self._beginning = beginning(model.fingerprint)
        self._half = max(num_blocks_for(options.max_model_len, options.block_size), options.num_blocks // 4)
        self._layout = KVLayout(
            engine="llama_cpp",
            model=model.fingerprint,
            dtype=options.dtype,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            block_size=options.block_size,
            num_blocks=2 * self._half,
            kv_planes=1,
            axes="none",
            opaque_format=f"pieces of llama.cpp states of {VERSION}",
            # What a piece has beside its tokens fits, were each block one.
            opaque_bytes=(HEADER_BYTES + fixed + per_token * options.block_size,),
        )
        try:
            self._pool = KVPool.allocate(self._layout)
        except KVTransferError as exc:
            raise ConfigError(f"no memory to move KV in: {exc}; lower --kv-memory-mb or --max-model-len") from exc
        self._blocks = self._pool.as_array()
        self._outgoing, self._incoming = BlockAllocator(self._half), BlockAllocator(self._half)
        self._context = Context(
            model.library,
            model.handle,
            num_cells=options.num_blocks * options.block_size,
            num_sequences=options.max_num_seqs,
            max_batch=options.max_num_batched_tokens,
            dtype=options.dtype,
            num_threads=options.num_threads or len(os.sched_getaffinity(0)),
        )

    @property
    def kv_layout(self) -> KVLayout:
        return self._layout

    @property
    def kv_pools(self) -> SequenceOf[KVPool]:
        return () if self._pool is None else (self._pool,)

    def reserve(self, key: str, request: Request) -> tuple[int, ...] | None:
        count = num_blocks_for(request.num_input_tokens, self._spec.block_size)
        if not self._seq_ids or count > self._incoming.num_free or super().reserve(key, request) is None:
            return None
        block_ids = [self._half + i for i in self._incoming.allocate(count)]
        self._places[key] = _Place(self._seq_ids.pop(), block_ids, self._beginning)
        return tuple(block_ids)

    def step(self) -> list[EngineEvent]:
        if self._must_clear:
            self._start_over()
        return super().step()

    def close(self) -> None:
        super().close()
        self._close()

    def _close(self) -> None:
        if self._context is not None:
            self._context.close()
        self._model.close()
        if self._pool is not None:
            del self._blocks
            self._pool.close()
            self._pool = None

    # ---- what BatchingEngine asks ---------------------------------------------------------------------------------

    def _startable(self) -> SequenceOf[Sequence]:
        found: list[Sequence] = []
        free = self._outgoing.num_free
        for sequence in self._waiting[: len(self._seq_ids)]:
            if sequence.mode is Mode.PREFILL:
                free -= num_blocks_for(len(sequence.tokens), self._spec.block_size)
            if free < 0:
                break
            found.append(sequence)
        return found

    def _start(self, sequence: Sequence) -> None:
        count = num_blocks_for(len(sequence.tokens), self._spec.block_size) if sequence.mode is Mode.PREFILL else 0
        self._places[sequence.key] = _Place(self._seq_ids.pop(), self._outgoing.allocate(count), self._beginning)

    def _compute(self, work: Work) -> SequenceOf[tuple[Sequence, Sampled | None]]:
        assert self._context is not None
        parts, finishing = [], []
        for sequence, count in work:
            start, end = sequence.num_computed, sequence.num_computed + count
            seq_id = self._places[sequence.key].seq_id
            assert seq_id is not None, "it computes after its KV was given out"
            parts.append(Tokens(seq_id, sequence.tokens[start:end], start, end == len(sequence.tokens)))
            if parts[-1].with_logits:
                finishing.append(sequence)
        logits = self._context.forward(parts)
        return [(s, choose(row, draw_of(s))) for s, row in zip(finishing, logits, strict=True)]

    def _kv_ready(self, sequence: Sequence) -> list[EngineEvent]:
        assert self._context is not None
        place, tokens, size = self._places[sequence.key], sequence.tokens, self._spec.block_size
        assert place.seq_id is not None, "it computes after its KV was given out"
        is_last = sequence.num_computed == len(tokens)
        start = place.sealed.num_tokens
        end = len(tokens) if is_last else sequence.num_computed // size * size
        if end <= start or not (is_last or self._model.is_divisible):
            return []
        first = start // size
        block_ids = place.block_ids[first : num_blocks_for(end, size)]
        piece = np.zeros(len(block_ids) * self._layout.block_bytes, np.uint8)
        written = self._context.export(place.seq_id, start, end, piece[HEADER_BYTES:])
        after = place.sealed.after(tokens[start:end])
        header = seal(piece[HEADER_BYTES : HEADER_BYTES + written], place.sealed, after)
        piece[:HEADER_BYTES] = np.frombuffer(header, np.uint8)
        self._blocks[block_ids] = piece.reshape(len(block_ids), -1)
        place.sealed = after
        if is_last:
            self._leave_context(place)
            self._allocator.free(sequence.blocks)
            sequence.blocks = []
        return [BlocksReady(sequence.key, first, tuple(block_ids), is_last)]

    def _take_in(self, sequence: Sequence) -> None:
        assert self._context is not None
        place = self._places[sequence.key]
        assert place.seq_id is not None
        try:
            self._take_in_pieces(place.seq_id, self._blocks[place.block_ids].reshape(-1), sequence.tokens)
        except Unsealed as exc:
            self._context.remove(place.seq_id)
            raise KVRejected(sequence.key, str(exc)) from exc
        self._free_pool_blocks(place)

    def _take_in_pieces(self, seq_id: int, data: ByteArray, token_ids: SequenceOf[int]) -> None:
        assert self._context is not None
        size, done = self._spec.block_size, self._beginning
        while done.num_tokens < len(token_ids):
            if done.num_tokens % size:
                raise Unsealed(f"a piece of it ends after {done.num_tokens} tokens, inside a block of {size}")
            state, after = unseal(data[done.num_tokens // size * self._layout.block_bytes :], done, token_ids)
            if not self._context.take_in(seq_id, done.num_tokens, after.num_tokens, state):
                why = self._model.library.last_complaint() or "it does not say why"
                raise Unsealed(f"llama.cpp does not take it ({why})")
            done = after

    def _let_go(self, sequence: Sequence) -> None:
        place = self._places.pop(sequence.key, None)
        if place is not None:
            self._leave_context(place)
            self._free_pool_blocks(place)

    def _wipe(self, sequence: Sequence) -> None:
        # Every sequence's attention runs over all cells, and masks with zero weights, which do not mask a NaN.
        self._must_clear = True

    # ---- places ---------------------------------------------------------------------------------------------------

    def _leave_context(self, place: _Place) -> None:
        if place.seq_id is not None and self._context is not None:
            self._context.remove(place.seq_id)
            self._seq_ids.append(place.seq_id)
            place.seq_id = None

    def _free_pool_blocks(self, place: _Place) -> None:
        outgoing = [i for i in place.block_ids if i < self._half]
        self._outgoing.free(outgoing)
        self._incoming.free([i - self._half for i in place.block_ids if i >= self._half])
        place.block_ids = []

    def _start_over(self) -> None:
        """Zero the context; what runs is computed again."""
        assert self._context is not None
        self._must_clear = False
        for sequence in list(self._running):
            if sequence.mode is Mode.PREFILL:
                # It keeps its blocks of the pool: peers may be reading what lies in the first of them.
                sequence.num_computed = 0
            else:
                self._preempt(sequence)
        self._plan = None
        self._context.clear()
