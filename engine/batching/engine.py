"""A driver that batches continuously: sequences, their blocks, and what each step makes of them."""

from __future__ import annotations

import bisect
import itertools
from abc import abstractmethod
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from engine.batching.blocks import BlockAllocator, num_blocks_for
from engine.batching.checks import check_request
from engine.batching.draws import Draw, Sampled, seed_of
from engine.batching.scheduler import StepPlan, plan_step
from engine.batching.sequence import Sequence
from engine.batching.stopping import StopChecker
from engine.port import BlocksReady, EngineDriver, EngineEvent, EngineLoad, EngineSpec, Mode, TokensOut
from splitwise_sched.detokenizer import TokenTexts
from splitwise_sched.errors import InvalidRequest
from splitwise_sched.types import FinishReason, Request

Work = SequenceOf[tuple[Sequence, int]]


def draw_of(sequence: Sequence) -> Draw:
    """How the next token of a sequence is chosen."""
    sampling = sequence.request.sampling
    return Draw(sampling, seed_of(sampling, sequence.request.request_id), sequence.num_output)


class BatchingEngine(EngineDriver):
    """Everything of ``EngineDriver`` but the computing, and where KV lies.

    A sequence is in exactly one place: waiting (no blocks), running, reserved (blocks, KV on its way) or held (a
    prefill run that is done, kept until ``release``).
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        max_num_batched_tokens: int,
        eos_token_ids: Iterable[int] = (),
        texts: TokenTexts | None = None,
    ) -> None:
        """
        Args:
            texts: of the model's tokens; without them, requests with stop strings are refused.
        """
        self._spec = spec
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._texts = texts
        self._allocator = BlockAllocator(spec.num_blocks)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._reserved: set[str] = set()
        self._held: set[str] = set()
        self._pending: list[EngineEvent] = []
        self._arrivals = itertools.count()
        self._num_preempted = 0
        self._plan: StepPlan | None = None

    # ---- what an engine adds --------------------------------------------------------------------------------------

    @abstractmethod
    def _compute(self, work: Work) -> SequenceOf[tuple[Sequence, Sampled | None]]:
        """Put the KV of the next ``n`` tokens of each sequence into its blocks.

        Returns:
            The next token of each sequence whose known tokens are all computed then; None where the logits were not
            finite numbers.
        """

    @abstractmethod
    def _wipe(self, sequence: Sequence) -> None:
        """Its KV made no finite logits: no later owner of its place may meet it."""

    def _kv_ready(self, sequence: Sequence) -> list[EngineEvent]:
        """What the chunk of a PREFILL run that was just computed has made ready to be sent."""
        is_last = sequence.num_computed == len(sequence.tokens)
        first = sequence.num_reported_blocks
        end = len(sequence.blocks) if is_last else sequence.num_computed // self._spec.block_size
        sequence.num_reported_blocks = end
        if end == first:
            return []
        return [BlocksReady(sequence.key, first, tuple(sequence.blocks[first:end]), is_last)]

    def _startable(self) -> SequenceOf[Sequence]:
        """Of those that wait, oldest first, how many could start in the next step, blocks aside."""
        return self._waiting[: self._spec.max_num_seqs]

    def _start(self, sequence: Sequence) -> None:
        """Its first chunk is next."""

    def _take_in(self, sequence: Sequence) -> None:
        """The KV in its reserved blocks is complete. Raises KVRejected."""

    def _let_go(self, sequence: Sequence) -> None:
        """Its KV is not needed any more; called before its blocks are freed."""

    # ---- EngineDriver ---------------------------------------------------------------------------------------------

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    def check(self, request: Request) -> None:
        check_request(request, self._spec)
        if request.sampling.stop and self._texts is None:
            raise InvalidRequest(
                f"this engine does not know the texts of the tokens of {self._spec.model!r}: stop strings cannot be "
                "used, give stop_token_ids",
                param="stop",
            )

    def submit(self, key: str, request: Request, mode: Mode) -> None:
        self._waiting.append(self._admit(key, request, mode))

    def reserve(self, key: str, request: Request) -> tuple[int, ...] | None:
        if not self._has_room_for(request):
            return None
        sequence = self._admit(key, request, Mode.FULL)
        sequence.blocks = self._allocator.allocate(num_blocks_for(request.num_input_tokens + 1, self._spec.block_size))
        self._reserved.add(key)
        return tuple(sequence.blocks[: num_blocks_for(request.num_input_tokens, self._spec.block_size)])

    def commit(self, key: str, first: TokensOut) -> None:
        if key not in self._reserved:
            raise ValueError(f"{key!r} has no reserved blocks: it was never reserved, or was aborted")
        sequence = self._sequences[key]
        if len(first.token_ids) != 1 or first.index != sequence.num_output:
            raise ValueError(f"{key!r} goes on at output {sequence.num_output} with one token, not with {first}")
        self._take_in(sequence)
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
                self._start(sequence)
            sequence.blocks += self._allocator.allocate(chunk.num_new_blocks)
        chosen = self._compute(work)
        for sequence, count in work:
            sequence.num_computed += count
            if sequence.mode is Mode.PREFILL:
                events += self._kv_ready(sequence)
        events += [self._append(sequence, choice) for sequence, choice in chosen]
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
        """Forgets all requests; engines go on with what else they hold."""
        for key in list(self._sequences):
            self.abort(key)
        self._pending.clear()

    # ---- sequences ------------------------------------------------------------------------------------------------

    def _has_room_for(self, request: Request) -> bool:
        """Whether KV of a request can be taken in from outside now."""
        needed = num_blocks_for(request.num_input_tokens + 1, self._spec.block_size)
        # A block of growth is left to each running sequence, or the newcomer would soon be preempted for it; and who
        # was preempted comes back first, or newcomers could keep it waiting for ever.
        spoken_for = len(self._running) + sum(
            num_blocks_for(len(s.tokens), self._spec.block_size) for s in self._waiting if s.preempted
        )
        return needed + spoken_for <= self._allocator.num_free

    def _admit(self, key: str, request: Request, mode: Mode) -> Sequence:
        if key in self._sequences:
            raise ValueError(f"{key!r} is already here")
        stop = StopChecker(request.sampling, self._eos_token_ids, self._texts, request.emitted_token_ids)
        sequence = self._sequences[key] = Sequence(key, request, mode, next(self._arrivals), stop)
        self._plan = None
        return sequence

    def _next_plan(self) -> StepPlan:
        if self._plan is None:
            self._plan = plan_step(
                [sequence.candidate() for sequence in self._running],
                [sequence.candidate() for sequence in self._startable()],
                num_free_blocks=self._allocator.num_free,
                block_size=self._spec.block_size,
                max_num_seqs=self._spec.max_num_seqs,
                max_num_batched_tokens=self._max_num_batched_tokens,
            )
        return self._plan

    def _append(self, sequence: Sequence, choice: Sampled | None) -> TokensOut:
        """Take a sampled token; where the sequence ends or pauses with it, move it to where it belongs."""
        key, index = sequence.key, sequence.num_output
        if choice is None:
            self._wipe(sequence)
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
        self._free(sequence)
        sequence.num_computed = 0
        sequence.preempted = True
        bisect.insort(self._waiting, sequence, key=lambda s: s.arrival)
        self._num_preempted += 1

    def _forget(self, sequence: Sequence) -> None:
        """Take a sequence out of wherever it is, and free what it holds."""
        self._plan = None
        del self._sequences[sequence.key]
        self._reserved.discard(sequence.key)
        self._held.discard(sequence.key)
        for place in (self._running, self._waiting):
            if sequence in place:
                place.remove(sequence)
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        self._allocator.free(sequence.blocks)
        sequence.blocks = []
