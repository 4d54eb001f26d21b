"""A model's tokenizer and chat template, read from its directory; needs no inference engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from splitwise_sched.detokenizer import IncrementalDecoder
from splitwise_sched.errors import ConfigError, InvalidRequest
from splitwise_sched.stop_strings import StopMatcher

if TYPE_CHECKING:
    import tokenizers
    from jinja2 import Template

__all__ = ["IncrementalDecoder", "StopMatcher", "Tokenizer"]

MAX_TOKENIZER_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20
MAX_RENDERED_CHARS = 32 << 20
_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads.

    Attributes:
        eos_token_ids: the ids that end a sequence, from generation_config.json, config.json or the tokenizer itself.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any],
        chat_template: Template | None,
        eos: Sequence[int],
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._role_tokens = {role: _token_text(config[role]) for role in _SPECIAL_ROLES if config.get(role)}
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.eos_token_ids = tuple(eos)
        self.is_byte_level = _is_byte_level(backend)
        self._token_bytes = lru_cache(maxsize=1 << 16)(self._make_token_bytes)

    @classmethod
    def from_pretrained_dir(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and what lies beside it in a model directory.

        Raises:
            ConfigError: something is missing, too large or malformed, or the ``gateway`` extra is not installed.
        """
        folder = Path(path)
        backend = _load_backend(folder)
        config = _read_json(folder / "tokenizer_config.json")
        config = {**_read_json(folder / "special_tokens_map.json"), **config}
        return cls(
            backend,
            config=config,
            chat_template=_chat_template(folder, config),
            eos=_eos_ids(folder, config, backend),
        )

    @property
    def vocab_size(self) -> int:
        """Ids are below this; includes added tokens."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; releases the GIL while it computes."""
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, special tokens included; none for an id that there is not."""
        return self._token_bytes(token_id)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses the messages.
        """
        from jinja2 import TemplateError

        if self._chat_template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or put a chat_template.jinja into its directory",
                param="messages",
            )
        try:
            text = self._chat_template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._role_tokens
            )
        except (TemplateError, TypeError, ValueError, LookupError, OverflowError, RecursionError) as exc:
            raise InvalidRequest(f"the model's chat template refuses these messages: {exc}", param="messages") from exc
        if len(text) > MAX_RENDERED_CHARS:
            raise InvalidRequest(f"the rendered prompt has {len(text)} characters: shorten it", param="messages")
        return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation's prompt. Raises InvalidRequest as ``render_chat`` does."""
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)

    def _make_token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return b""
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF_CHAR[character] for character in token)
            except KeyError:
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return self._backend.decode([token_id], skip_special_tokens=False).encode()


def _byte_of_char() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, as GPT-2 laid it down."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    return backend.decoder is not None and _decodes_bytes(json.loads(backend.decoder.__getstate__()))


def _decodes_bytes(decoder: Any) -> bool:
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or [None]
        return len(parts) == 1 and _decodes_bytes(parts[0])
    return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    try:
        import jinja2  # noqa: F401  (a missing half of the extra is told at start, not at the first chat)
        import tokenizers
    except ImportError as exc:
        raise ConfigError(f"{exc.name} is not installed: pip install 'splitwise-sched[gateway]'") from exc
    path = folder / "tokenizer.json"
    if not path.is_file():
        _refuse_missing(folder)
    data = _read_bounded(path, MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as exc:  # tokenizers raises plain Exception for whatever is wrong in the file
        raise ConfigError(f"{path} is not a readable tokenizer: {exc}") from exc


def _refuse_missing(folder: Path) -> NoReturn:
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is not a directory: give one that holds a model's tokenizer.json")
    remedy = "give a directory that holds one"
    if any((folder / name).exists() for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")):
        remedy = f"write one with transformers: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)"
    raise ConfigError(f"there is no tokenizer.json in {str(folder)!r}: {remedy}")


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    if len(data) > limit:
        raise ConfigError(f"{path} is larger than {limit} bytes, which no tokenizer file should be")
    return data


def _read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_bounded(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not readable JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _chat_template(folder: Path, config: Mapping[str, Any]) -> Template | None:
    """chat_template.jinja, else the one in tokenizer_config.json: text, or a list of named ones with a default."""
    from splitwise_sched.chat_template import compile_template

    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return compile_template(_read_bounded(path, MAX_CONFIG_BYTES).decode())
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{path} is not UTF-8 text: {exc}") from exc
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None:
        return None
    if not isinstance(template, str):
        kind = type(template).__name__
        raise ConfigError(f"chat_template in {folder / 'tokenizer_config.json'} is a {kind}, not text")
    return compile_template(template)


def _eos_ids(folder: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(folder / name).get("eos_token_id")
        ids: list[Any] = eos if isinstance(eos, list) else [eos]
        if eos is not None and all(isinstance(id_, int) for id_ in ids):
            return ids
    token = backend.token_to_id(_token_text(config["eos_token"])) if config.get("eos_token") else None
    return [] if token is None else [token]


def _token_text(token: Any) -> str:
    """A special token as configs write it: text, or an object with ``content``."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ConfigError(f"a special token in tokenizer_config.json is {str(token)[:80]!r}: it must be text")
    return text
