"""The demo's model: a small Llama, made and trained on the spot, so that a demo needs no download."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine.demo.corpus import Corpus, load_corpus
from splitwise_sched.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers
    from rich.console import Console
    from transformers import LlamaForCausalLM

    from engine.demo.training import Recipe

LOCK_TIMEOUT_S = 600.0
_LOCK_POLL_S = 0.2
_SOURCES = ("training.py", "muon.py", "model.py")


def ensure_demo_model(
    cache_dir: Path | None = None, *, console: Console | None = None, recipe: Recipe | None = None
) -> Path:
    """The directory of the demo model; the first call makes it, which takes less than a minute on two quiet cores.

    Args:
        cache_dir: holds models made before; ``$XDG_CACHE_HOME/splitwise-sched`` when left out.
        console: where to show a progress bar; standard error when left out.
    Raises:
        ConfigError: the directory cannot be written, or another process has been making the model for too long.
    """
    from engine.demo.training import Recipe as DefaultRecipe

    recipe = recipe or DefaultRecipe()
    corpus = load_corpus()
    parent = cache_dir or _default_cache_dir()
    final = parent / f"demo-model-{_fingerprint(corpus, recipe)}"
    if final.is_dir():
        return final
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_suffix(".lock")):
            if not final.is_dir():
                _make(final, corpus, recipe, console)
    except OSError as exc:
        raise ConfigError(
            f"the demo model cannot be kept in {str(parent)!r} ({exc.strerror or exc}): set XDG_CACHE_HOME to a "
            "directory that can be written"
        ) from exc
    return final


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitwise-sched"


def _fingerprint(corpus: Corpus, recipe: Recipe) -> str:
    """Changes with everything that the result depends on."""
    digest = hashlib.sha256(repr(recipe).encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    for text in corpus.texts():
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time in; the lock of one that died is free."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another process has held {str(path)!r} for {LOCK_TIMEOUT_S:.0f} s: end it, and try again"
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield


def _make(final: Path, corpus: Corpus, recipe: Recipe, console: Console | None) -> None:
    """Under the lock: train beside ``final``, and put it there in one step."""
    from engine.demo.training import train_model, train_tokenizer

    prefix = f"{final.name}.part-"
    for leftover in final.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        with _progress_bar(console) as on_progress:
            tokenizer = train_tokenizer(corpus, recipe)
            model = train_model(corpus, tokenizer, recipe, on_progress)
        _save_model(model, part)
        _save_tokenizer(tokenizer, part, recipe)
        part.chmod(0o755)
        part.rename(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Without the progress bar, which one small file does not need."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder)
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, recipe: Recipe) -> None:
    from engine.demo.training import CHAT_TEMPLATE, END_OF_TEXT, TURN_END

    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": recipe.max_position_embeddings,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _progress_bar(console: Console | None) -> Iterator[Callable[[float], None]]:
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console or Terminal(stderr=True)) as progress:
        task = progress.add_task("training a small Llama, once", total=1.0)
        yield lambda part: progress.update(task, completed=part)


if __name__ == "__main__":
    print(ensure_demo_model())
