"""One llama.cpp context: sequences by number, forward passes over them, and their KV as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engine.batching.sampler import FloatArray
from engine.llama_cpp.blob import ByteArray
from engine.llama_cpp.library import FLASH_ATTENTION_OFF, Batch, Library
from splitwise_sched.errors import ConfigError

# ggml_type
KV_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
MICRO_BATCH = 512


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one sequence computes in a pass: ``token_ids`` at positions ``start`` onward, with the last one's logits."""

    seq_id: int
    token_ids: Sequence[int]
    start: int
    with_logits: bool


class Context:
    """KV cells that all its sequences share; ``close`` before the model is freed.

    One sequence more than its callers use carries what is a part of theirs, in or out: llama.cpp has states of whole
    sequences alone.
    """

    def __init__(
        self,
        library: Library,
        model: int,
        *,
        num_cells: int,
        num_sequences: int,
        max_batch: int,
        dtype: str,
        num_threads: int,
    ) -> None:
        """Raises ConfigError when llama.cpp cannot make it."""
        self._library, self._api = library, library.api
        params = self._api.llama_context_default_params()
        self._carrier = num_sequences
        params.n_ctx, params.n_seq_max, params.kv_unified = num_cells, num_sequences + 1, True
        # llama.cpp ends the process where there are fewer tokens in a batch than sequences.
        params.n_batch = max(max_batch, num_sequences + 1)
        params.n_ubatch = min(params.n_batch, MICRO_BATCH)
        params.n_threads = params.n_threads_batch = num_threads
        params.type_k = params.type_v = KV_TYPES[dtype]
        # With it, how V lies in a state depends on the machine.
        params.flash_attn_type = FLASH_ATTENTION_OFF
        library.complaints.clear()
        self._context: int | None = self._api.llama_init_from_model(model, params)
        if not self._context:
            raise ConfigError(
                f"llama.cpp makes no context of {num_cells} tokens for {num_sequences} sequences "
                f"({library.last_complaint() or 'it does not say why'}): lower --num-gpu-blocks-override, "
                "--kv-memory-mb or --max-num-seqs"
            )
        self._memory = self._api.llama_get_memory(self._context)
        self._vocab_size = int(self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(model)))
        self._token = np.zeros(max_batch, np.int32)
        self._position = np.zeros(max_batch, np.int32)
        self._num_ids = np.ones(max_batch, np.int32)
        self._seq_id = np.zeros(max_batch, np.int32)
        self._seq_ids = self._seq_id.ctypes.data + self._seq_id.itemsize * np.arange(max_batch, dtype=np.uintp)
        self._wanted = np.zeros(max_batch, np.int8)
        self._batch = Batch(
            0,
            self._token.ctypes.data,
            None,
            self._position.ctypes.data,
            self._num_ids.ctypes.data,
            self._seq_ids.ctypes.data,
            self._wanted.ctypes.data,
        )

    def forward(self, parts: Sequence[Tokens]) -> list[FloatArray]:
        """One pass over all parts; logits [vocab_size] of those that want them, in order, valid until the next pass."""
        end, last = 0, []
        self._wanted[:] = 0
        for part in parts:
            begin, end = end, end + len(part.token_ids)
            self._token[begin:end] = part.token_ids
            self._position[begin:end] = np.arange(part.start, part.start + end - begin)
            self._seq_id[begin:end] = part.seq_id
            if part.with_logits:
                self._wanted[end - 1] = 1
                last.append(end - 1)
        self._batch.n_tokens = end
        if (code := self._api.llama_decode(self._context, self._batch)) != 0:
            raise RuntimeError(
                f"llama_decode ended with code {code} on {end} tokens of {len(parts)} sequences: "
                f"{self._library.last_complaint() or 'it does not say why'}"
            )
        return [
            np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, index), (self._vocab_size,))
            for index in last
        ]

    def state_bytes(self, seq_id: int) -> int:
        """Of all KV of a sequence."""
        return int(self._api.llama_state_seq_get_size(self._context, seq_id))

    def export(self, seq_id: int, start: int, end: int, out: ByteArray) -> int:
        """Copy the KV of positions ``start`` to ``end`` of a sequence, which it has, to the beginning of ``out``.

        Returns:
            Bytes written.
        """
        whole = start == 0 and self._last_position(seq_id) == end - 1
        source = seq_id if whole else self._carrier
        if not whole:
            # Both have these cells then; nothing is copied.
            self._api.llama_memory_seq_cp(self._memory, seq_id, source, start, end)
        try:
            written = int(self._api.llama_state_seq_get_data(self._context, out.ctypes.data, out.nbytes, source))
        finally:
            if not whole:
                self.remove(source)
        if written == 0:
            raise RuntimeError(
                f"llama.cpp gives no KV of positions {start} to {end} in {out.nbytes} bytes: "
                f"{self._library.last_complaint() or 'it does not say why'}"
            )
        return written

    def take_in(self, seq_id: int, start: int, end: int, state: ByteArray) -> bool:
        """Add to a sequence, which ends at ``start``, what ``export`` gave elsewhere.

        Returns:
            False when it is not taken; the sequence is as it was then.
        """
        target = seq_id if start == 0 else self._carrier
        self._library.complaints.clear()
        read = self._api.llama_state_seq_set_data(self._context, state.ctypes.data, state.nbytes, target)
        taken = read == state.nbytes and self._last_position(target) == end - 1
        if target != seq_id:
            taken = taken and self._api.llama_memory_seq_pos_min(self._memory, target) == start
            if taken:
                self._api.llama_memory_seq_cp(self._memory, target, seq_id, -1, -1)
            self.remove(target)
        elif not taken:
            self.remove(seq_id)
        return bool(taken)

    def _last_position(self, seq_id: int) -> int:
        return int(self._api.llama_memory_seq_pos_max(self._memory, seq_id))

    def remove(self, seq_id: int) -> None:
        """Forget a sequence; its cells are free."""
        self._api.llama_memory_seq_rm(self._memory, seq_id, -1, -1)

    def clear(self) -> None:
        """Forget all sequences and zero their cells."""
        self._api.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        """Idempotent."""
        context, self._context = self._context, None
        if context:
            self._api.llama_free(context)


@contextmanager
def probing(library: Library, model: int, dtype: str) -> Iterator[Context]:
    """A context just large enough to look at the form of its states."""
    context = Context(library, model, num_cells=256, num_sequences=1, max_batch=8, dtype=dtype, num_threads=1)
    try:
        yield context
    finally:
        context.close()


def state_bytes(library: Library, model: int, dtype: str) -> tuple[int, int]:
    """(fixed, a token): the bytes of a sequence's state.

    Raises:
        ConfigError: the states of this model do not grow by the token.
    """
    with probing(library, model, dtype) as context:
        sizes = []
        for count in (1, 2, 4):
            context.forward([Tokens(0, [0] * count, 0, True)])
            sizes.append(context.state_bytes(0))
            context.remove(0)
    per_token = sizes[1] - sizes[0]
    if per_token <= 0 or sizes[2] - sizes[1] != 2 * per_token:
        raise ConfigError(
            f"the KV of 1, 2 and 4 tokens of this model takes {sizes} bytes: what does not grow by the token cannot be "
            "moved by this engine"
        )
    return sizes[0] - per_token, per_token
