"""Requests for the tiny models, and the means to run them through engines by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence

from engine.conformance.driving import Result, checksums, run, run_disaggregated, step
from splitwise_sched.types import Request, SamplingParams

__all__ = ["Result", "checksums", "greedy", "random_prompt", "run", "run_disaggregated", "step"]


def random_prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids of the tiny models, none of them special."""
    rng = random.Random(f"{seed}/{num_tokens}")
    return tuple(rng.randrange(3, 1024) for _ in range(num_tokens))


def greedy(prompt: Sequence[int], max_tokens: int = 24, request_id: str | None = None) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(request_id or f"r{len(prompt)}", "tiny", tuple(prompt), sampling)
