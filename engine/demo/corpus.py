"""What the demo model reads: the project's own short texts, and a little of what Python says about itself."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
_MODULES = ("contextlib", "dataclasses", "heapq", "queue", "random", "statistics", "textwrap", "threading")
_MAX_MODULE_BYTES = 1 << 20


class Dialogue(NamedTuple):
    """One answer, and the ways to ask for it."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Corpus:
    """
    Attributes:
        passages: running text, a paragraph each.
        docstrings: of a few modules of the running Python.
    """

    dialogues: tuple[Dialogue, ...]
    passages: tuple[str, ...]
    docstrings: tuple[str, ...]

    def texts(self) -> Iterator[str]:
        for dialogue in self.dialogues:
            yield from dialogue.questions
            yield dialogue.answer
        yield from self.passages
        yield from self.docstrings


def as_messages(dialogues: list[Dialogue], rng: random.Random) -> list[dict[str, str]]:
    """A conversation that asks for each answer in one of its ways."""
    messages = []
    for dialogue in dialogues:
        messages.append({"role": "user", "content": rng.choice(dialogue.questions)})
        messages.append({"role": "assistant", "content": dialogue.answer})
    return messages


def load_corpus() -> Corpus:
    return Corpus(
        dialogues=tuple(_dialogues((_HERE / "questions.txt").read_text(encoding="utf-8"))),
        passages=tuple(_paragraphs((_HERE / "prose.txt").read_text(encoding="utf-8"))),
        docstrings=tuple(_docstrings(Path(sysconfig.get_path("stdlib")))),
    )


def _paragraphs(text: str) -> Iterator[str]:
    return (part.strip() for part in text.split("\n\n") if part.strip())


def _dialogues(text: str) -> Iterator[Dialogue]:
    """Paragraphs of ``Q: one way to ask | another`` and, on the next line, ``A: answer``."""
    for paragraph in _paragraphs(text):
        asked, _, answer = paragraph.partition("\nA: ")
        yield Dialogue(tuple(way.strip() for way in asked.removeprefix("Q: ").split("|")), answer)


def _docstrings(stdlib: Path) -> Iterator[str]:
    """Docstrings of ``_MODULES``, read without importing them; one that is not there as source is left out."""
    for name in _MODULES:
        try:
            tree = ast.parse((stdlib / f"{name}.py").read_bytes()[:_MAX_MODULE_BYTES])
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) > 80:
                    yield docstring
