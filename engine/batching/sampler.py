"""Choosing the next token from one row of logits, for engines that do not use torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.batching.draws import Draw, Sampled, uniform
from splitwise_sched.types import TokenLogprob

FloatArray = npt.NDArray[np.float32]
# Far below any that matters, and still above 0 in float32.
_LEAST_TEMPERATURE = 1e-30


def choose(logits: FloatArray, draw: Draw) -> Sampled | None:
    """
    Args:
        logits: [vocab_size]; not changed.
    Returns:
        None where there is no finite maximum, so that nothing can be drawn.
    """
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        return None
    token_id = best if draw.sampling.temperature == 0 else _draw(logits, draw)
    count = draw.sampling.logprobs
    return Sampled(token_id, None if count is None else _logprob(logits, token_id, count))


def _draw(logits: FloatArray, draw: Draw) -> int:
    """Temperature, then top-k, then top-p of what is left, then the inverse of the cumulative distribution."""
    sampling = draw.sampling
    # Relative to the best, so that a tiny temperature gives -inf for the others and never an overflow to inf.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / np.float32(max(sampling.temperature, _LEAST_TEMPERATURE))
    if 0 < sampling.top_k < len(scaled):
        kth = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        scaled = np.where(scaled < kth, np.float32(-np.inf), scaled)
    probs = np.exp(scaled)
    probs /= probs.sum()
    if sampling.top_p < 1.0:
        descending = np.sort(probs)[::-1]
        before = np.cumsum(descending, dtype=np.float64) - descending
        size = max(1, int((before < sampling.top_p).sum()))
        probs = np.where(probs < descending[size - 1], np.float32(0), probs)
    cumulative = np.cumsum(probs, dtype=np.float64)
    # side="right": the first token whose cumulative probability exceeds u, so none of probability 0 is ever taken.
    token_id = int(np.searchsorted(cumulative, uniform(draw.seed, draw.position) * cumulative[-1], side="right"))
    # Rounding of u times the sum may point past the last token that can be.
    return min(token_id, int(np.flatnonzero(probs)[-1]))


def _logprob(logits: FloatArray, token_id: int, count: int) -> TokenLogprob:
    """Under the model itself, before temperature and filters."""
    relative = logits - logits.max()
    logprobs = relative - np.log(np.exp(relative).sum())
    # Stable, so that of two equal ones the lower id, which greedy takes, comes first.
    top = np.argsort(-logprobs, kind="stable")[:count]
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple((int(i), float(logprobs[i])) for i in top))
