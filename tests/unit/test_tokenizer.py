"""Tokenizer directories, streamed detokenisation and stop strings, on tokenizers made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from splitwise_sched.errors import ConfigError, InvalidRequest
from splitwise_sched.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer
from tests.tokenizer_dirs import CHATML, TEXT, byte_level, saved


def sentencepiece_like() -> tokenizers.Tokenizer:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for character in sorted(set("▁" + "".join(TEXT[0] + TEXT[2]).replace(" ", "▁").replace("\n", ""))):
        vocabulary[character] = len(vocabulary)
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("o", "x"), ("▁", "▁")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def wordpiece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return backend


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained_dir(saved(tmp_path_factory.mktemp("bytes"), byte_level(), chat_template=CHATML))


@pytest.fixture(scope="module")
def pieces_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained_dir(saved(tmp_path_factory.mktemp("pieces"), sentencepiece_like()))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(id_) for id_ in ids] + [decoder.flush()]
    assert decoder.num_chars == len("".join(pieces))
    return pieces


# -- streamed detokenisation ------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(data=st.data())
def test_any_tokens_of_a_byte_level_vocabulary_stream_as_they_decode(
    data: st.DataObject, bytes_tokenizer: Tokenizer
) -> None:
    ids = data.draw(st.lists(st.integers(0, bytes_tokenizer.vocab_size - 1), max_size=40))
    assert "".join(streamed(bytes_tokenizer, ids)) == bytes_tokenizer.decode(ids)


@settings(max_examples=200)
@given(text=st.text(max_size=60) | st.sampled_from(TEXT))
def test_text_streams_whole_through_byte_level_and_byte_fallback_tokenizers(
    text: str, bytes_tokenizer: Tokenizer, pieces_tokenizer: Tokenizer
) -> None:
    for tokenizer in (bytes_tokenizer, pieces_tokenizer):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_words_keep_their_spaces_through_a_wordpiece_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained_dir(saved(tmp_path, wordpiece()))
    ids = tokenizer.encode(TEXT[0])
    assert "".join(streamed(tokenizer, ids)) == TEXT[0]


def test_a_character_is_shown_with_its_last_byte_and_not_before(bytes_tokenizer: Tokenizer) -> None:
    ids = [bytes_tokenizer._backend.token_to_id(token) for token in "ðŁĻĤ"]
    assert streamed(bytes_tokenizer, ids) == ["", "", "", "🙂", ""]
    assert streamed(bytes_tokenizer, ids[:2])[-1] == "\ufffd"


def test_endless_invalid_bytes_are_not_held_forever(pieces_tokenizer: Tokenizer) -> None:
    continuation = pieces_tokenizer._backend.token_to_id("<0x80>")
    decoder = IncrementalDecoder(pieces_tokenizer)
    shown = "".join(decoder.push(continuation) for _ in range(100))
    assert len(shown) >= 90
    assert len(decoder._window) < 30


def test_special_tokens_are_left_out_unless_asked_for(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("the<|im_end|>")
    assert "".join(streamed(bytes_tokenizer, ids)) == "the"
    decoder = IncrementalDecoder(bytes_tokenizer, skip_special_tokens=False)
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == "the<|im_end|>"


def test_token_bytes_add_up_to_the_text_in_utf8(bytes_tokenizer: Tokenizer, pieces_tokenizer: Tokenizer) -> None:
    text = "größe 🙂 <mask me>"
    assert b"".join(map(bytes_tokenizer.token_bytes, bytes_tokenizer.encode(text))).decode() == text
    assert pieces_tokenizer.token_bytes(pieces_tokenizer._backend.token_to_id("<0xE2>")) == b"\xe2"
    assert bytes_tokenizer.token_bytes(10**9) == b""
    assert bytes_tokenizer.token_bytes(-1) == b""


# -- stop strings -----------------------------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What StopMatcher must find, by looking at every position."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500)
@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=6), max_size=12),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = [matcher.feed(piece) for piece in pieces]
    whole = "".join(pieces)
    text, stop = first_stop(whole, stops)
    for i in range(len(shown)):
        assert text.startswith("".join(shown[: i + 1]))
    assert ("".join(shown) + matcher.flush(), matcher.matched) == (text, stop)


@given(text=st.text(alphabet="abc", max_size=30))
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(text: str) -> None:
    matcher = StopMatcher(["abcabd", "cc!"])
    shown = matcher.feed(text)
    held = text[len(shown) :]
    assert matcher.matched is None
    assert any(stop.startswith(held) for stop in ("abcabd", "cc!"))


# -- directories ------------------------------------------------------------------------------------------------------


def test_chat_prompts_follow_the_template_of_the_directory(tmp_path: Path) -> None:
    saved(tmp_path, byte_level(), chat_template="not this one", eos_token={"content": "<|im_end|>"})
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    tokenizer = Tokenizer.from_pretrained_dir(tmp_path)
    messages = [{"role": "user", "content": "the fox"}]
    text = "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(messages) == text
    ids = tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.is_special(ids[0])
    assert tokenizer.eos_token_ids == (tokenizer.encode("<|im_end|>")[0],)


def test_helpers_that_templates_expect_are_there(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ bos_token }}"
    )
    path = saved(tmp_path, byte_level(), chat_template=[{"name": "default", "template": template}], bos_token="<B>")
    tokenizer = Tokenizer.from_pretrained_dir(path)
    assert tokenizer.render_chat([{"role": "é<"}, {"role": "tool"}]) == '{"role": "é<"}4<B>'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].role.x.y }}",
        "{{ ''.__class__.__mro__ }}{{ 1 + '' }}",
    ],
)
def test_messages_that_the_template_refuses_are_the_users_error(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.from_pretrained_dir(saved(tmp_path, byte_level(), chat_template=template))
    with pytest.raises(InvalidRequest, match="chat template refuses") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_templates_reach_nothing_outside_their_sandbox(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__base__.__subclasses__() }}"
    tokenizer = Tokenizer.from_pretrained_dir(saved(tmp_path, byte_level(), chat_template=template))
    with pytest.raises(InvalidRequest, match="unsafe"):
        tokenizer.render_chat([])


def test_a_model_without_template_says_so(pieces_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"no chat template.*v1/completions"):
        pieces_tokenizer.apply_chat_template([])


@pytest.mark.parametrize(
    ("source", "expected"),
    [({"generation_config.json": {"eos_token_id": [5, 7]}, "config.json": {"eos_token_id": 3}}, (5, 7)),
     ({"config.json": {"eos_token_id": 3}}, (3,)),
     ({"generation_config.json": {}}, ())],
)  # fmt: skip
def test_eos_ids_come_from_the_first_file_that_names_them(
    tmp_path: Path, source: dict[str, object], expected: tuple[int, ...]
) -> None:
    saved(tmp_path, byte_level())
    for name, value in source.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert Tokenizer.from_pretrained_dir(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.model": "x"}, "write one with transformers"),
        ({"tokenizer.json": "{"}, "not a readable tokenizer"),
        ({"tokenizer.json": None, "tokenizer_config.json": "["}, "not readable JSON"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "holds a list"),
        ({"tokenizer.json": None, "tokenizer_config.json": '{"chat_template": 3}'}, "not text"),
        ({"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": 3}'}, "special token"),
        ({"tokenizer.json": None, "chat_template.jinja": "{% if %}"}, "chat template is not readable"),
    ],
)
def test_directories_that_cannot_work_are_refused_by_name(
    tmp_path: Path, files: dict[str, str | None], message: str
) -> None:
    for name, content in files.items():
        if content is None:
            byte_level().save(str(tmp_path / name))
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_pretrained_dir(tmp_path)


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.* is not a directory"):
        Tokenizer.from_pretrained_dir(tmp_path / "nowhere")
