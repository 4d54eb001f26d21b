"""A short name for what a model computes: its configuration and its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from splitwise_sched.errors import ConfigError

# What differs between two copies of one model, and does not change its KV.
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
MAX_HEADER_BYTES = 100 << 20
# Of a tensor no longer than this all bytes are read, of a longer one so many pieces: a change to a whole matrix, as
# training makes it, shows; the cost stays bounded by the number of tensors.
WHOLE_TENSOR_BYTES = 64 << 10
NUM_PIECES = 16
PIECE_BYTES = 4 << 10


def fingerprint(path: Path) -> str:
    """32 hexadecimal digits; the same wherever config.json and the tensors are the same, however they are sharded.

    Raises:
        ConfigError: a safetensors file is not one.
    """
    config = json.loads((path / "config.json").read_bytes())
    digest = hashlib.sha256(_canonical({name: config[name] for name in config if name not in _VOLATILE}))
    tensors: dict[str, str] = {}
    for file_path in sorted(path.glob("*.safetensors")):
        with file_path.open("rb") as file:
            tensors.update(_tensor_digests(file, file_path))
    digest.update(_canonical(tensors))
    return digest.hexdigest()[:32]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _tensor_digests(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    """(name, digest over dtype, shape and data) for each tensor of a safetensors file."""
    header_bytes = int.from_bytes(file.read(8), "little")
    file_bytes = path.stat().st_size
    if not 0 < header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise ConfigError(f"{path} is not a safetensors file, or is cut off: download it again")
    try:
        header = json.loads(file.read(header_bytes))
        entries = [
            (name, [entry["dtype"], entry["shape"]], *map(int, entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ConfigError(f"{path} has no readable safetensors header: download it again") from exc
    data_start = 8 + header_bytes
    for name, kind, begin, end in entries:
        if not 0 <= begin <= end <= file_bytes - data_start:
            raise ConfigError(f"{path} is cut off: it lacks data of {name}; download it again")
        digest = hashlib.sha256(_canonical(kind))
        for offset, length in _pieces(end - begin):
            file.seek(data_start + begin + offset)
            digest.update(file.read(length))
        yield name, digest.hexdigest()


def _pieces(num_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is read of a tensor: evenly spread, first and last bytes included."""
    if num_bytes <= WHOLE_TENSOR_BYTES:
        yield 0, num_bytes
        return
    for i in range(NUM_PIECES):
        yield (num_bytes - PIECE_BYTES) * i // (NUM_PIECES - 1), PIECE_BYTES
