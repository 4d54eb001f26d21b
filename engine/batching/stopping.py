"""When one sequence's output ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from splitwise_sched.detokenizer import IncrementalDecoder, TokenTexts
from splitwise_sched.stop_strings import StopMatcher
from splitwise_sched.types import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Ending:
    reason: FinishReason
    stop: str | int | None = None


class StopChecker:
    """Watches the output tokens of one sequence; each is pushed once, in order, those already emitted included."""

    def __init__(
        self,
        sampling: SamplingParams,
        eos_token_ids: Iterable[int],
        texts: TokenTexts | None,
        emitted: Sequence[int] = (),
    ) -> None:
        self._max_tokens = sampling.max_tokens
        self._eos = frozenset() if sampling.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._decoder = IncrementalDecoder(texts) if sampling.stop and texts is not None else None
        self._num_output = 0
        for token_id in emitted:
            self.push(token_id)

    def push(self, token_id: int) -> Ending | None:
        """Take the next output token; returns how the output ends with it, if it does."""
        self._num_output += 1
        if token_id in self._eos:
            return Ending(FinishReason.STOP)
        if token_id in self._stop_token_ids:
            return Ending(FinishReason.STOP, token_id)
        if self._matcher is not None and self._decoder is not None:
            self._matcher.feed(self._decoder.push(token_id))
            if self._matcher.matched is not None:
                return Ending(FinishReason.STOP, self._matcher.matched)
        if self._num_output >= self._max_tokens:
            return Ending(FinishReason.LENGTH)
        return None
