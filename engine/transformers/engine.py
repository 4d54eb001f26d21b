"""The engine itself: holds the sequences, runs a forward pass a step, and tells what came of it."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from engine.port import BlocksReady, EngineDriver, EngineEvent, EngineLoad, EngineSpec, Mode, TokensOut
from engine.transformers.attention import use_paged_attention
from engine.transformers.batch import Batch, build_batch
from engine.transformers.blocks import BlockAllocator, num_blocks_for
from engine.transformers.loading import load_model
from engine.transformers.options import TransformersOptions
from engine.transformers.pool import allocate_pool
from engine.transformers.probe import probe_kv_shape
from engine.transformers.sampler import Draw, Sampled, sample, seed_of
from engine.transformers.scheduler import StepPlan, plan_step
from engine.transformers.sequence import Sequence
from engine.transformers.spans import CausalMasks
from engine.transformers.stopping import StopChecker
from kv_transfer.layout import KVLayout
from kv_transfer.memory import KVPool
from splitwise_sched.errors import InvalidRequest
from splitwise_sched.types import FinishReason, Request


class TransformersEngine(EngineDriver):
    """See ``EngineDriver`` for the life of a request.

    A sequence is in exactly one place: waiting (no blocks), running, reserved (blocks, KV on its way) or held (a
    prefill run that is done, blocks kept until ``release``).
    """

    def __init__(self, options: TransformersOptions) -> None:
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        loaded = load_model(options)
        self._model: Any = loaded.model
        self._tokenizer = loaded.tokenizer
        self._eos_token_ids = loaded.eos_token_ids
        use_paged_attention(self._model)
        self._pool = allocate_pool(options, loaded, probe_kv_shape(self._model))
        self._kv = self._pool.kv
        self._masks = CausalMasks(self._kv.dtype, self._kv.device)
        self._options = options
        self._spec = EngineSpec(
            model=options.served_model_name or options.model,
            max_model_len=self._pool.max_model_len,
            num_blocks=self._pool.layout.num_blocks,
            block_size=options.block_size,
            max_num_seqs=options.max_num_seqs,
            vocab_size=loaded.vocab_size,
        )
        self._allocator = BlockAllocator(self._spec.num_blocks)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._reserved: set[str] = set()
        self._held: set[str] = set()
        self._pending: list[EngineEvent] = []
        self._arrivals = itertools.count()
        self._num_preempted = 0
        self._plan: StepPlan | None = None

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def kv_layout(self) -> KVLayout:
        return self._pool.layout

    @property
    def kv_pools(self) -> SequenceOf[KVPool]:
        """Empty on a CUDA device, whose pool no other process can reach."""
        return self._pool.shared

    def check(self, request: Request) -> None:
        sampling = request.sampling
        total = len(request.prompt_token_ids) + sampling.max_tokens
        if total > self._spec.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(request.prompt_token_ids)} tokens and max_tokens is {sampling.max_tokens}: "
                f"together {total}, and this engine holds {self._spec.max_model_len}; shorten the prompt or lower "
                "max_tokens",
                param="max_tokens",
            )
        if len(request.emitted_token_ids) >= sampling.max_tokens:
            raise InvalidRequest(
                f"{len(request.emitted_token_ids)} tokens were emitted before and max_tokens is "
                f"{sampling.max_tokens}: nothing is left to compute",
                param="max_tokens",
            )
        for token_id in (*request.prompt_token_ids, *request.emitted_token_ids):
            if not 0 <= token_id < self._spec.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is not one of this model: they are 0 to {self._spec.vocab_size - 1}",
                    param="prompt",
                )

    def submit(self, key: str, request: Request, mode: Mode) -> None:
        self._waiting.append(self._admit(key, request, mode))

    def reserve(self, key: str, request: Request) -> tuple[int, ...] | None:
        num_tokens = request.num_input_tokens
        needed = num_blocks_for(num_tokens + 1, self._spec.block_size)
        # A block of growth is left to each running sequence, or the newcomer would soon be preempted for it; and who
        # was preempted comes back first, or newcomers could keep it waiting for ever.
        spoken_for = len(self._running) + sum(
            num_blocks_for(len(s.tokens), self._spec.block_size) for s in self._waiting if s.preempted
        )
        if needed + spoken_for > self._allocator.num_free:
            return None
        sequence = self._admit(key, request, Mode.FULL)
        sequence.blocks = self._allocator.allocate(needed)
        self._reserved.add(key)
        return tuple(sequence.blocks[: num_blocks_for(num_tokens, self._spec.block_size)])

    def commit(self, key: str, first: TokensOut) -> None:
        if key not in self._reserved:
            raise ValueError(f"{key!r} has no reserved blocks: it was never reserved, or was aborted")
        sequence = self._sequences[key]
        if len(first.token_ids) != 1 or first.index != sequence.num_output:
            raise ValueError(f"{key!r} goes on at output {sequence.num_output} with one token, not with {first}")
        self._reserved.remove(key)
        self._plan = None
        sequence.num_computed = len(sequence.tokens)
        sequence.tokens += first.token_ids
        ending = sequence.stop.push(first.token_ids[0])
        if first.finish_reason is not None:
            self._forget(sequence)
        elif ending is not None:
            # The prefill engine went on where this one stops: nobody has told the user yet.
            self._pending.append(TokensOut(key, sequence.num_output, (), (), ending.reason, ending.stop))
            self._forget(sequence)
        else:
            bisect.insort(self._running, sequence, key=lambda s: s.arrival)

    def release(self, key: str) -> None:
        if key in self._held:
            self._forget(self._sequences[key])

    def abort(self, key: str) -> None:
        if key in self._sequences:
            self._forget(self._sequences[key])
        self._pending = [event for event in self._pending if event.key != key]

    def has_work(self) -> bool:
        return bool(self._pending or self._next_plan().chunks)

    @torch.inference_mode()
    def step(self) -> list[EngineEvent]:
        events, self._pending = self._pending, []
        plan = self._next_plan()
        self._plan = None
        for key in plan.preempted:
            self._preempt(self._sequences[key])
        if not plan.chunks:
            return events
        work = [(self._sequences[chunk.key], chunk.num_tokens) for chunk in plan.chunks]
        for (sequence, _), chunk in zip(work, plan.chunks, strict=True):
            if not sequence.blocks:
                self._waiting.remove(sequence)
                sequence.preempted = False
                bisect.insort(self._running, sequence, key=lambda s: s.arrival)
            sequence.blocks += self._allocator.allocate(chunk.num_new_blocks)
        batch = build_batch(self._kv, work, self._masks)
        sampled = self._forward(batch)
        for sequence, count in work:
            sequence.num_computed += count
            if sequence.mode is Mode.PREFILL:
                events += self._newly_ready(sequence)
        for sequence, choice in zip(batch.finishing, sampled, strict=True):
            events.append(self._append(sequence, choice))
        return events

    def load(self) -> EngineLoad:
        # Whatever holds blocks counts as running.
        return EngineLoad(
            num_running=len(self._running) + len(self._reserved) + len(self._held),
            num_waiting=len(self._waiting),
            num_free_blocks=self._allocator.num_free,
            num_preempted_total=self._num_preempted,
        )

    def close(self) -> None:
        for key in list(self._sequences):
            self.abort(key)
        self._pending.clear()
        # Whoever still holds the engine must not keep the weights alive by it.
        self._model = None
        self._pool.close()

    def _admit(self, key: str, request: Request, mode: Mode) -> Sequence:
        if key in self._sequences:
            raise ValueError(f"{key!r} is already here")
        stop = StopChecker(request.sampling, self._eos_token_ids, self._tokenizer, request.emitted_token_ids)
        sequence = self._sequences[key] = Sequence(key, request, mode, next(self._arrivals), stop)
        self._plan = None
        return sequence

    def _next_plan(self) -> StepPlan:
        if self._plan is None:
            self._plan = plan_step(
                [sequence.candidate() for sequence in self._running],
                [sequence.candidate() for sequence in self._waiting[: self._spec.max_num_seqs]],
                num_free_blocks=self._allocator.num_free,
                block_size=self._spec.block_size,
                max_num_seqs=self._spec.max_num_seqs,
                max_num_batched_tokens=self._options.max_num_batched_tokens,
            )
        return self._plan

    def _forward(self, batch: Batch) -> list[Sampled | None]:
        logits = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.last_index,
            paged=batch.paged,
        ).logits[0]
        if not batch.finishing:
            return []
        draws = [
            Draw(s.request.sampling, seed_of(s.request.sampling, s.request.request_id), s.num_output)
            for s in batch.finishing
        ]
        return sample(logits, draws)

    def _newly_ready(self, sequence: Sequence) -> list[EngineEvent]:
        is_last = sequence.num_computed == len(sequence.tokens)
        first = sequence.num_reported_blocks
        end = len(sequence.blocks) if is_last else sequence.num_computed // self._spec.block_size
        sequence.num_reported_blocks = end
        if end == first:
            return []
        return [BlocksReady(sequence.key, first, tuple(sequence.blocks[first:end]), is_last)]

    def _append(self, sequence: Sequence, choice: Sampled | None) -> TokensOut:
        """Take a sampled token; where the sequence ends or pauses with it, move it to where it belongs."""
        key, index = sequence.key, sequence.num_output
        if choice is None:
            # What made the logits non-finite lies in the KV, where later owners of the blocks would meet it.
            self._kv.clear(sequence.blocks)
            self._end(sequence)
            detail = "the model computed logits that are not finite numbers for this request"
            return TokensOut(key, index, (), (), FinishReason.ERROR, None, detail)
        sequence.tokens.append(choice.token_id)
        ending = sequence.stop.push(choice.token_id)
        if ending is not None or sequence.mode is Mode.PREFILL:
            self._end(sequence)
        logprobs = () if choice.logprob is None else (choice.logprob,)
        if ending is None:
            return TokensOut(key, index, (choice.token_id,), logprobs)
        return TokensOut(key, index, (choice.token_id,), logprobs, ending.reason, ending.stop)

    def _end(self, sequence: Sequence) -> None:
        if sequence.mode is Mode.PREFILL:
            self._running.remove(sequence)
            self._held.add(sequence.key)
        else:
            self._forget(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._allocator.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.preempted = True
        bisect.insort(self._waiting, sequence, key=lambda s: s.arrival)
        self._num_preempted += 1

    def _forget(self, sequence: Sequence) -> None:
        """Take a sequence out of wherever it is, and free its blocks."""
        self._plan = None
        del self._sequences[sequence.key]
        self._reserved.discard(sequence.key)
        self._held.discard(sequence.key)
        for place in (self._running, self._waiting):
            if sequence in place:
                place.remove(sequence)
        self._allocator.free(sequence.blocks)
        sequence.blocks = []
