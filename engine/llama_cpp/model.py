"""A GGUF model in memory, and what the engine must know of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.llama_cpp.context import state_bytes
from engine.llama_cpp.gguf_file import find_files, fingerprint
from engine.llama_cpp.library import Library, load_library
from engine.llama_cpp.vocabulary import Vocabulary
from splitwise_sched.errors import ConfigError


class LoadedModel:
    """``close`` frees it, after its contexts.

    Attributes:
        handle: the C library's own.
        max_len: positions that it was made for.
        state_bytes: of one sequence: fixed, and a token.
        is_divisible: whether KV of a part of a sequence can be moved by itself. Layers with a sliding window give up
            cells that no later token looks at, so that a part may lack some which the whole does not need.
    """

    def __init__(self, library: Library, files: Sequence[Path], dtype: str) -> None:
        """Raises ConfigError: llama.cpp cannot load it, or this engine cannot move its KV."""
        self.library = library
        params = library.api.llama_model_default_params()
        params.n_gpu_layers = 0
        library.complaints.clear()
        self.handle: int = library.api.llama_model_load_from_file(str(files[0]).encode(), params)
        if not self.handle:
            raise ConfigError(
                f"llama.cpp cannot load {str(files[0])!r}: {library.last_complaint() or 'it does not say why'}"
            )
        try:
            self._check(files[0])
            self.fingerprint = fingerprint(list(files))
            self.vocabulary = Vocabulary(library, self.handle)
            self.max_len = int(library.api.llama_model_n_ctx_train(self.handle))
            self.is_divisible = library.api.llama_model_n_swa(self.handle) == 0
            self.state_bytes = state_bytes(library, self.handle, dtype)
        except BaseException:
            self.close()
            raise

    def _check(self, path: Path) -> None:
        api = self.library.api
        for kind, is_one in (
            ("keeps a recurrent state", api.llama_model_is_recurrent),
            ("keeps a recurrent state in some layers", api.llama_model_is_hybrid),
            ("has an encoder", api.llama_model_has_encoder),
        ):
            if is_one(self.handle):
                raise ConfigError(f"the model {str(path)!r} {kind}: this engine runs decoders with attention alone")

    def close(self) -> None:
        """Idempotent."""
        handle, self.handle = self.handle, 0
        if handle:
            self.library.api.llama_model_free(handle)


def load_model(model: str, dtype: str) -> LoadedModel:
    """Raises ConfigError, before anything heavy is done where that can be told."""
    files = find_files(model)
    return LoadedModel(load_library(), files, dtype)
