"""The copy kernel's index arithmetic in numpy, step by step as its source has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kv_transfer.transports.cuda_ipc.kernel import Launch


def quotient(numbers: np.ndarray, multiplier: int, shift: int) -> np.ndarray:
    """As in the kernel: a 64-bit product of 32-bit numbers, shifted."""
    return ((numbers.astype(np.uint64) * np.uint64(multiplier)) >> np.uint64(shift)).astype(np.uint32)


def locate(launch: Launch, numbers: np.ndarray, tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Source and destination addresses of words.

    Args:
        numbers: uint32, of words of the launch.
        tables: ``run_src``, ``run_dst``, ``unit_src`` and ``unit_dst``, int64.
    """
    run_src, run_dst, unit_src, unit_dst = tables
    _, values = launch.arguments()
    _, run_words, run_multiplier, run_shift, num_runs, runs_multiplier, runs_shift = values
    in_order = quotient(numbers, run_multiplier, run_shift)
    unit = quotient(in_order, runs_multiplier, runs_shift)
    run = in_order - unit * np.uint32(num_runs)
    at = (numbers - in_order * np.uint32(run_words)).astype(np.int64) * launch.word_bytes
    return run_src[run] + unit_src[unit] + at, run_dst[run] + unit_dst[unit] + at
