"""The demo model: trained for a moment, then read back by the parts that will use it."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rich.console import Console  # noqa: E402

from engine.demo.corpus import load_corpus  # noqa: E402
from engine.demo.model import ensure_demo_model  # noqa: E402
from engine.demo.muon import orthogonalize  # noqa: E402
from engine.demo.training import Recipe, train_tokenizer  # noqa: E402
from splitwise_sched.errors import ConfigError  # noqa: E402
from splitwise_sched.tokenizer import Tokenizer  # noqa: E402

QUICK = dataclasses.replace(Recipe(), num_steps=4, batch_size=2, long_lengths=(64,), long_every=2)


def make(cache_dir: Path, recipe: Recipe = QUICK) -> Path:
    return ensure_demo_model(cache_dir, console=Console(file=io.StringIO()), recipe=recipe)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cache"))


def test_the_directory_loads_in_transformers_and_in_the_gateways_tokenizer(model_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True)
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 4096
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    tokenizer = Tokenizer.from_pretrained_dir(model_dir)
    assert tokenizer.vocab_size == model.config.vocab_size
    assert list(tokenizer.eos_token_ids) == model.generation_config.eos_token_id
    text = "größe 🙂\n\tany text at all"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_renders_chats_as_the_gateway_does(model_dir: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is prefill?"}]
    ours = Tokenizer.from_pretrained_dir(model_dir).apply_chat_template(messages)
    theirs = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ours == theirs


def test_a_second_call_finds_what_the_first_made(model_dir: Path) -> None:
    before = (model_dir / "model.safetensors").stat().st_mtime_ns
    assert make(model_dir.parent) == model_dir
    assert (model_dir / "model.safetensors").stat().st_mtime_ns == before


def test_the_same_recipe_gives_the_same_weights(model_dir: Path, tmp_path: Path) -> None:
    again = make(tmp_path)
    assert (again / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()


def test_another_recipe_is_another_model(tmp_path: Path, model_dir: Path) -> None:
    assert make(tmp_path, dataclasses.replace(QUICK, seed=21)).name != model_dir.name


def test_processes_that_start_together_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        paths = pool.map(make, [tmp_path, tmp_path])
    assert paths[0] == paths[1]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [paths[0].name]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, model_dir: Path) -> None:
    leftover = tmp_path / f"{model_dir.name}.part-dead"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    made = make(tmp_path)
    assert not leftover.exists()
    assert made.is_dir()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        make(blocker / "cache")


def test_training_stops_at_its_limit_however_slow_the_machine(tmp_path: Path) -> None:
    endless = dataclasses.replace(QUICK, num_steps=10**9, grace_s=0.0, limit_s=0.5)
    assert make(tmp_path, endless).is_dir()


def test_every_dialogue_has_questions_and_an_answer() -> None:
    corpus = load_corpus()
    assert len(corpus.dialogues) > 100
    for questions, answer in corpus.dialogues:
        assert all(question and "\n" not in question for question in questions)
        assert answer and "Q:" not in answer and "|" not in answer
    asked = [question for questions, _ in corpus.dialogues for question in questions]
    assert len(asked) == len(set(asked))


def test_most_words_of_the_corpus_are_one_token() -> None:
    tokenizer = train_tokenizer(load_corpus(), Recipe())
    assert tokenizer.get_vocab_size() == Recipe().vocab_size
    words = ["the", "cache", "holds", "the", "keys", "and", "values", "of", "every", "token"]
    assert sum(len(tokenizer.encode(" " + word).ids) == 1 for word in words) >= 8


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 8, 32), (2, 32, 8), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.6
