"""Token ids to text, one token at a time, without half characters."""

from __future__ import annotations

import codecs
from typing import Protocol

REPLACEMENT = "\ufffd"
# A character has at most 4 UTF-8 bytes: tokens that still end in the middle of one after so many are not UTF-8.
_MAX_HELD_TOKENS = 8


class TokenTexts(Protocol):
    """What the decoder needs of a tokenizer."""

    @property
    def is_byte_level(self) -> bool: ...

    def is_special(self, token_id: int) -> bool: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str: ...


class IncrementalDecoder:
    """Streaming detokenisation of one sequence; amortised O(1) a token.

    With a byte-level tokenizer the pieces add up to exactly what decoding all tokens at once gives, for any tokens.
    With others (SentencePiece with byte fallback, WordPiece) they do for every sequence of valid UTF-8; of invalid
    bytes, what was already given stays as it was.

    Attributes:
        num_chars: characters given so far, which is where the text of the next token begins.
    """

    def __init__(self, tokenizer: TokenTexts, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._window: list[int] = []
        self._num_given = 0
        self.num_chars = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        if self._utf8 is not None:
            piece = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        else:
            piece = self._push_windowed(token_id)
        self.num_chars += len(piece)
        return piece

    def flush(self) -> str:
        """The rest, at the end of the sequence: a character that never became whole is U+FFFD."""
        if self._utf8 is not None:
            piece = self._utf8.decode(b"", final=True)
        else:
            given = self._decode(self._window[: self._num_given])
            piece = self._decode(self._window)[len(given) :]
            self._num_given = len(self._window)
        self.num_chars += len(piece)
        return piece

    def _push_windowed(self, token_id: int) -> str:
        """Decode the last given tokens with the new ones, since a decoder joins by what stands before.

        The window always begins where a character begins: byte-fallback decoders judge a run of bytes as a whole.
        """
        self._window.append(token_id)
        given = self._decode(self._window[: self._num_given])
        text = self._decode(self._window)
        num_held = len(self._window) - self._num_given
        if num_held < _MAX_HELD_TOKENS and (len(text) <= len(given) or text.endswith(REPLACEMENT)):
            return ""
        self._window = self._window[self._num_given :]
        self._num_given = len(self._window)
        return text[len(given) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
