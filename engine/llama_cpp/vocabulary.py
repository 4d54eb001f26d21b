"""A GGUF model's tokens, as its vocabulary has them: ``TokenTexts`` for stop strings, and which ones end an answer."""

from __future__ import annotations

import ctypes as c
from functools import lru_cache

from engine.llama_cpp.library import Library

_NO_VOCABULARY = 0
_PIECE_BYTES = 256


class Vocabulary:
    """Valid as long as its model.

    Attributes:
        has_texts: whether the file has a tokenizer at all.
    """

    is_byte_level = True

    def __init__(self, library: Library, model: int) -> None:
        self._api = library.api
        self._vocab = self._api.llama_model_get_vocab(model)
        self.size = int(self._api.llama_vocab_n_tokens(self._vocab))
        self.has_texts = self._api.llama_vocab_type(self._vocab) != _NO_VOCABULARY
        self._token_bytes = lru_cache(maxsize=1 << 16)(self._read_piece)

    def end_token_ids(self) -> frozenset[int]:
        if not self.has_texts:
            return frozenset()
        return frozenset(i for i in range(self.size) if self._api.llama_vocab_is_eog(self._vocab, i))

    def is_special(self, token_id: int) -> bool:
        return bool(self._api.llama_vocab_is_control(self._vocab, token_id))

    def token_bytes(self, token_id: int) -> bytes:
        return self._token_bytes(token_id)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        kept = (t for t in token_ids if not (skip_special_tokens and self.is_special(t)))
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def _read_piece(self, token_id: int) -> bytes:
        length = _PIECE_BYTES
        while True:
            buffer = c.create_string_buffer(length)
            written = self._api.llama_token_to_piece(self._vocab, token_id, buffer, length, 0, True)
            if written >= 0:
                return buffer.raw[:written]
            length = -written
