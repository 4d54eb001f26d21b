"""A GGUF model's files: are they there, and what is their fingerprint."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from splitwise_sched.errors import ConfigError

MAGIC = b"GGUF"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# What is read for the fingerprint: the metadata at the beginning, and pieces of the tensors, evenly spread. A change to
# a whole matrix, as training or quantizing makes it, shows; the cost is bounded.
HEAD_BYTES = 16 << 20
NUM_PIECES = 2048
PIECE_BYTES = 4 << 10


def find_files(model: str) -> list[Path]:
    """All files of a model, the one to load first.

    Raises:
        ConfigError: there is no such file, it is no GGUF, or a part of it is missing.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        found = ", ".join(sorted(p.name for p in path.glob("*.gguf"))[:4]) or "none is in it"
        raise ConfigError(f"--model {model} is a directory: the llama_cpp engine wants a GGUF file ({found})")
    files = [path]
    if (split := _SPLIT.fullmatch(path.name)) is not None:
        stem, _, count = split.groups()
        files = [path.with_name(f"{stem}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    for file in files:
        try:
            with file.open("rb") as opened:
                magic = opened.read(len(MAGIC))
        except OSError as exc:
            raise ConfigError(f"model file {str(file)!r} cannot be read ({exc.strerror}): check --model") from exc
        if magic != MAGIC:
            raise ConfigError(
                f"{str(file)!r} is not a GGUF file: the llama_cpp engine runs GGUF models, convert it with llama.cpp's "
                "convert_hf_to_gguf.py, or serve it with another --engine"
            )
    return files


def fingerprint(files: list[Path]) -> str:
    """32 hexadecimal digits; the same for the same files, wherever they lie."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as opened:
            digest.update(opened.read(HEAD_BYTES))
            rest = size - HEAD_BYTES - PIECE_BYTES
            for i in range(NUM_PIECES if rest > 0 else 0):
                opened.seek(HEAD_BYTES + rest * i // (NUM_PIECES - 1))
                digest.update(opened.read(PIECE_BYTES))
    return digest.hexdigest()[:32]
