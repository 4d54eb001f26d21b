"""Choosing the next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.batching.draws import Draw, Sampled, uniform
from splitwise_sched.types import TokenLogprob

# Nucleus cut-offs are looked for among so many of the most likely tokens first, to spare a sort of the vocabulary.
_NUCLEUS_PROBE = 256
# Far below any that matters, and still above 0 in float32.
_LEAST_TEMPERATURE = 1e-30


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Sampled | None]:
    """Choose a token for each row.

    Args:
        logits: [num_rows, vocab_size]
        draws: [num_rows]
    Returns:
        [num_rows]; None where the model gave no finite maximum, so that nothing can be drawn.
    """
    logits = logits.float()
    best, greedy = logits.max(dim=-1)
    tokens = greedy.tolist()
    random_rows = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if random_rows:
        drawn = _draw(logits[random_rows], [draws[row] for row in random_rows])
        for row, token_id in zip(random_rows, drawn, strict=True):
            tokens[row] = token_id
    logprobs = _logprobs(logits, tokens, draws)
    return [
        Sampled(token_id, logprobs.get(row)) if finite else None
        for row, (token_id, finite) in enumerate(zip(tokens, best.isfinite().tolist(), strict=True))
    ]


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Temperature, then top-k, then top-p of what is left, then the inverse of the cumulative distribution."""
    device = logits.device
    temperature = torch.tensor([max(d.sampling.temperature, _LEAST_TEMPERATURE) for d in draws], device=device)
    # Relative to the best, so that a tiny temperature gives -inf for the others and never an overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)
    _keep_top_k(logits, [d.sampling.top_k for d in draws])
    probs = logits.softmax(dim=-1)
    _keep_top_p(probs, [d.sampling.top_p for d in draws])
    cumulative = probs.double().cumsum(dim=-1)
    u = torch.tensor([uniform(d.seed, d.position) for d in draws], dtype=torch.float64, device=device).unsqueeze(1)
    # right=True: the first token whose cumulative probability exceeds u, so none of probability 0 is ever taken.
    tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp_(max=probs.shape[-1] - 1)
    if bool((probs.gather(1, tokens) == 0).any()):
        # Rounding of u times the sum pointed past the last token that can be.
        last_possible = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(dim=-1, keepdim=True)
        tokens = torch.minimum(tokens, last_possible)
    return tokens.squeeze(1).tolist()


def _keep_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> None:
    """Set the logits below each row's k-th largest to -inf; equals of the k-th stay."""
    vocab_size = logits.shape[-1]
    for k in {k for k in top_k if 0 < k < vocab_size}:
        rows = [row for row, other in enumerate(top_k) if other == k]
        some = logits[rows]
        logits[rows] = some.masked_fill(some < some.topk(k).values[:, -1:], float("-inf"))


def _keep_top_p(probs: torch.Tensor, top_p: Sequence[float]) -> None:
    """Zero what lies outside each row's nucleus: the most likely tokens up to a mass of p; equals of the last stay."""
    rows = [row for row, p in enumerate(top_p) if p < 1.0]
    if not rows:
        return
    some = probs[rows]
    mass = torch.tensor([top_p[row] for row in rows], dtype=torch.float64, device=probs.device).unsqueeze(1)
    descending = some.topk(min(_NUCLEUS_PROBE, some.shape[-1])).values
    if bool((descending.double().sum(dim=-1, keepdim=True) < mass).any()):
        descending = some.sort(dim=-1, descending=True).values
    before = descending.double().cumsum(dim=-1) - descending.double()
    size = (before < mass).sum(dim=-1, keepdim=True).clamp(min=1)
    cutoff = descending.gather(1, size - 1)
    probs[rows] = some.masked_fill(some < cutoff, 0.0)


def _logprobs(logits: torch.Tensor, tokens: Sequence[int], draws: Sequence[Draw]) -> dict[int, TokenLogprob]:
    """By row, for those that ask: logprobs under the model itself, before temperature and filters."""
    rows = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    if not rows:
        return {}
    logprobs = logits[rows].log_softmax(dim=-1)
    most = max(draws[row].sampling.logprobs or 0 for row in rows)
    top = logprobs.topk(min(most, logprobs.shape[-1]))
    result = {}
    for i, row in enumerate(rows):
        count = draws[row].sampling.logprobs or 0
        pairs = zip(top.indices[i, :count].tolist(), top.values[i, :count].tolist(), strict=True)
        result[row] = TokenLogprob(tokens[row], logprobs[i, tokens[row]].item(), tuple(pairs))
    return result
