"""What a sequence draws at each output position.

It depends on its own parameters, seed and output position alone: not on what else is in the batch, nor on how often the
position is run again, nor on the engine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from splitwise_sched.types import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row of logits is sampled: parameters, seed, and output position."""

    sampling: SamplingParams
    seed: int
    position: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """``logprob`` is None where none was asked for."""

    token_id: int
    logprob: TokenLogprob | None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one output position; the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def seed_of(sampling: SamplingParams, request_id: str) -> int:
    """The request's seed; one of its id when it has none, so that a re-run still draws the same."""
    if sampling.seed is not None:
        return sampling.seed
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")
