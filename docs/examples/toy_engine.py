"""A toy engine with a real KV cache: its next token depends on every byte of it."""

from pathlib import Path

import numpy as np

from engine.batching.engine import BatchingEngine, draw_of
from engine.batching.sampler import choose
from engine.plugins import EnginePlugin
from engine.port import EngineSpec
from kv_transfer import KVLayout, KVPool

VOCAB_SIZE, HEAD_DIM = 512, 16


class ToyEngine(BatchingEngine):
    def __init__(self, settings):
        size, count = settings.block_size, settings.num_gpu_blocks_override or 256
        layout = KVLayout(
            engine="toy", model=Path(settings.model).read_text().strip(), dtype="uint8",
            num_layers=1, num_kv_heads=1, head_dim=HEAD_DIM, block_size=size, num_blocks=count,
        )  # fmt: skip
        self._pool = KVPool.allocate(layout)
        self._kv = self._pool.as_array().reshape(count, 2, size, HEAD_DIM)  # K and V
        name = settings.served_model_name or settings.model
        spec = EngineSpec(name, size * count, count, size, settings.max_num_seqs, VOCAB_SIZE)
        super().__init__(spec, max_num_batched_tokens=settings.max_num_batched_tokens)

    @property
    def kv_layout(self):
        return self._pool.layout

    @property
    def kv_pools(self):
        return (self._pool,)

    def _compute(self, work):
        chosen = []
        for sequence, count in work:
            end = sequence.num_computed + count
            for at in range(sequence.num_computed, end):
                vectors = (sequence.tokens[at] + 1) * np.arange(3, 3 + 2 * HEAD_DIM) + at * 37
                block, row = divmod(at, self.spec.block_size)
                self._kv[sequence.blocks[block], :, row] = (vectors % 251).reshape(2, HEAD_DIM)
            if end == len(sequence.tokens):
                seen = self._kv[sequence.blocks].swapaxes(1, 2).reshape(-1, 2 * HEAD_DIM)[:end]
                generator = np.random.default_rng(np.frombuffer(seen.tobytes(), np.uint8))
                logits = generator.standard_normal(VOCAB_SIZE, dtype=np.float32)
                chosen.append((sequence, choose(logits, draw_of(sequence))))
        return chosen

    def _wipe(self, sequence):
        self._kv[sequence.blocks] = 0

    def close(self):
        super().close()
        self._kv = None
        self._pool.close()


class ToyPlugin(EnginePlugin):
    def create(self, settings, role):
        return ToyEngine(settings)

    def tiny_model(self, folder):
        (folder / "toy.txt").write_text("toy-1")
        return str(folder / "toy.txt")
