"""Puts the outputs of one request in order: what is stale, repeated or early does not reach its user.

Pure. Outputs come from two instances through one stream, each perhaps more than once, and after a re-run from others
again; every one says its epoch and the output position of its first token.
"""

from __future__ import annotations

from dataclasses import replace

from splitwise_sched.types import Output

# What waits for a gap to be filled; beyond it the gap grows, and is filled by a re-run.
MAX_EARLY, MAX_EARLY_TOKENS = 10_000, 100_000


class Assembly:
    """The output of one request as its user has it.

    Attributes:
        epoch: the highest seen; what comes under a lower one is stale.
        token_ids: all output tokens given out so far.
        ended: the output with the finish reason was given out.
    """

    def __init__(self, epoch: int = 1, token_ids: tuple[int, ...] = ()) -> None:
        self.epoch = epoch
        self.token_ids: list[int] = list(token_ids)
        self.ended = False
        self._early: dict[int, Output] = {}
        self._num_early_tokens = 0

    @property
    def has_gap(self) -> bool:
        """Tokens are here that come after others which are not."""
        return bool(self._early)

    def raise_epoch(self, epoch: int) -> bool:
        """Everything under lower epochs is stale from here. False: ``epoch`` is stale itself."""
        if epoch < self.epoch or self.ended:
            return False
        if epoch > self.epoch:
            self.epoch = epoch
            self._forget_early()
        return True

    def feed(self, output: Output) -> list[Output]:
        """What the user gets now that ``output`` is here: nothing, it (or its new part), or it and what had waited."""
        if output.epoch != self.epoch and not self.raise_epoch(output.epoch):
            return []
        if self.ended:
            return []
        if output.index == len(self.token_ids) and output.token_ids and not self._early:
            # As nearly all are: next in order.
            self.token_ids += output.token_ids
            self.ended = output.finish_reason is not None
            return [output]
        given = []
        next_output: Output | None = output
        while next_output is not None:
            position = len(self.token_ids)
            if next_output.index > position:
                self._keep_early(next_output)
                break
            skip = position - next_output.index
            fresh = next_output.token_ids[skip:]
            if fresh or next_output.finish_reason is not None:
                self.token_ids += fresh
                self.ended = next_output.finish_reason is not None
                given.append(
                    replace(next_output, index=position, token_ids=fresh, logprobs=next_output.logprobs[skip:])
                )
            if self.ended:
                self._forget_early()
                break
            ready = [index for index in self._early if index <= len(self.token_ids)]
            next_output = self._early.pop(min(ready)) if ready else None
            if next_output is not None:
                self._num_early_tokens -= len(next_output.token_ids)
        return given

    def _keep_early(self, output: Output) -> None:
        known = self._early.get(output.index)
        more = len(output.token_ids) - (0 if known is None else len(known.token_ids))
        if len(self._early) < MAX_EARLY and self._num_early_tokens + more <= MAX_EARLY_TOKENS:
            self._early[output.index] = output
            self._num_early_tokens += more

    def _forget_early(self) -> None:
        self._early.clear()
        self._num_early_tokens = 0
