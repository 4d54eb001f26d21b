"""The bodies of answers, in the shapes of OpenAI's two completion routes. Pure."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from splitwise_sched.gateway.answer_text import Piece, TokenEntry
from splitwise_sched.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0


class AnswerShape(ABC):
    """One answer: either ``whole``, or ``opening``, some ``chunk``s and perhaps ``usage_chunk``.

    Args:
        with_usage: chunks have a ``usage`` field, null in all but the usage chunk.
        with_token_ids: choices have a ``token_ids`` field, as vLLM's have.
    """

    kind: str
    chunk_kind: str

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        with_logprobs: bool,
        with_usage: bool = False,
        with_token_ids: bool = False,
    ) -> None:
        self._common = {"id": request_id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._with_usage = with_usage
        self.with_token_ids = with_token_ids

    def whole(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        choice = {"index": 0, **self._message(text), "logprobs": self._logprobs(tokens), **_finish(pieces[-1])}
        if self.with_token_ids:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
        return {**self._common, "object": self.kind, "choices": [choice], "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece."""
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        choice = {"index": 0, **self._delta(piece.text), "logprobs": logprobs, **_finish(piece)}
        if self.with_token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return self._chunk([choice])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._common, "object": self.chunk_kind, "choices": choices}
        return {**chunk, "usage": None} if self._with_usage else chunk

    @abstractmethod
    def _message(self, text: str) -> dict[str, Any]:
        """The field of a choice that holds the whole text."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """The field of a chunk's choice that holds its part of the text."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[TokenEntry]) -> dict[str, Any] | None: ...


class CompletionShape(AnswerShape):
    kind = chunk_kind = "text_completion"

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, tokens: Sequence[TokenEntry]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [self._label(t.logprob.token_id) for t in tokens],
            "token_logprobs": [_finite(t.logprob.logprob) for t in tokens],
            "top_logprobs": [{self._label(i): _finite(p) for i, p in t.logprob.top} for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def _label(self, token_id: int) -> str:
        return token_label(self._tokenizer.token_bytes(token_id))


class ChatShape(AnswerShape):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, tokens: Sequence[TokenEntry]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._entry(t.logprob.token_id, t.logprob.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in t.logprob.top],
            }
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": token_label(data), "logprob": _finite(logprob), "bytes": list(data)}


def usage_of(num_prompt_tokens: int, num_output_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }


def token_label(data: bytes) -> str:
    """A token's text; what is no text by itself as OpenAI writes it, ``bytes:\\xe2\\x80``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finish(piece: Piece) -> dict[str, Any]:
    return {"finish_reason": None if piece.finish_reason is None else piece.finish_reason.value}


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, MIN_LOGPROB)
