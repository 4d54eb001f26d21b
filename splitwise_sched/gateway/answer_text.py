"""One request's output tokens as the text that its user sees: whole characters, nothing of a stop string. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from splitwise_sched.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer
from splitwise_sched.types import FinishReason, Output, TokenLogprob


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token with its logprobs.

    Attributes:
        offset: where its text begins in the answer's, in characters.
    """

    logprob: TokenLogprob
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer.

    Attributes:
        tokens: those whose text begins in what was given so far; only when logprobs were asked for.
        finish_reason: on the last piece.
        token_ids: of the output that this piece came with; its text may come with a later one.
    """

    text: str
    tokens: tuple[TokenEntry, ...] = ()
    finish_reason: FinishReason | None = None
    token_ids: tuple[int, ...] = ()


class AnswerText:
    """Feed it a request's outputs in order.

    Args:
        ending_ids: tokens that end an answer without being part of its text, besides the tokenizer's own.

    Attributes:
        num_tokens: output tokens so far, also those that show no text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str], ending_ids: Iterable[int] = ()) -> None:
        self.num_tokens = 0
        self._ending_ids = frozenset((*tokenizer.eos_token_ids, *ending_ids))
        self._decoder = IncrementalDecoder(tokenizer)
        self._matcher = StopMatcher(stops)
        self._num_given = 0
        self._waiting: deque[TokenEntry] = deque()

    def feed(self, output: Output) -> Piece:
        """What can be shown now. After a piece with a finish reason nothing more may be fed.

        The engine ends at stop strings by itself; one that does not is overruled here.
        """
        pieces = []
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            if position < len(output.logprobs):
                self._waiting.append(TokenEntry(output.logprobs[position], self._decoder.num_chars))
            is_end = output.finish_reason is FinishReason.STOP and position == len(output.token_ids) - 1
            if not (is_end and token_id in self._ending_ids):
                pieces.append(self._decoder.push(token_id))
        if output.finish_reason is not None:
            pieces.append(self._decoder.flush())
        text = self._matcher.feed("".join(pieces))
        if self._matcher.matched is not None:
            return Piece(text, self._tokens_before(text), FinishReason.STOP, output.token_ids)
        if output.finish_reason is None:
            return Piece(text, self._tokens_before(text), None, output.token_ids)
        text += self._matcher.flush()
        self._num_given += len(text)
        tokens = tuple(self._waiting)
        self._waiting.clear()
        return Piece(text, tokens, output.finish_reason, output.token_ids)

    def _tokens_before(self, text: str) -> tuple[TokenEntry, ...]:
        """Tokens that begin in the text given so far, ``text`` included."""
        self._num_given += len(text)
        tokens = []
        while self._waiting and self._waiting[0].offset < self._num_given:
            tokens.append(self._waiting.popleft())
        return tuple(tokens)
