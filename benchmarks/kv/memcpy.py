"""The limit: one thread that copies scattered blocks, one memcpy a block, at the speed of C.

Compiled when it is first needed, with the machine's C compiler; where there is none, numpy copies block by block.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

_SOURCE = """
#include <stdint.h>
#include <string.h>
void copy_blocks(char *dst, const char *src, const int64_t *to, const int64_t *from, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; i++) memcpy(dst + to[i], src + from[i], size);
}
"""


class CopyLoop:
    """Copies blocks of one size between two pools, and says how long it took."""

    def __init__(self) -> None:
        self._function = _compile()

    @property
    def name(self) -> str:
        return "C memcpy loop" if self._function is not None else "numpy loop"

    def seconds(self, src: np.ndarray, dst: np.ndarray, offsets: tuple[np.ndarray, np.ndarray], size: int) -> float:
        """Args: ``offsets`` in bytes, of the sources and of the destinations; [num_blocks]."""
        src_at, dst_at = (np.ascontiguousarray(x, np.int64) for x in offsets)
        if self._function is not None:
            began = time.perf_counter()
            self._function(dst.ctypes.data, src.ctypes.data, dst_at.ctypes.data, src_at.ctypes.data, len(src_at), size)
            return time.perf_counter() - began
        pairs = list(zip(src_at.tolist(), dst_at.tolist(), strict=True))
        began = time.perf_counter()
        for start, end in pairs:
            dst[end : end + size] = src[start : start + size]
        return time.perf_counter() - began


def _compile() -> ctypes._CFuncPtr | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "copy.c"), Path(folder, "copy.so")
        source.write_text(_SOURCE, encoding="ascii")
        built = subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=False)
        if built.returncode:
            return None
        function = ctypes.CDLL(str(library)).copy_blocks
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2
    function.restype = None
    return function
