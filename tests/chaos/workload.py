"""What users ask for, and the one right answer to it: both are functions of the request's id.

A token says two things: which it is (its *value*, a function of the prompt and of all values before it, so that a
re-run which got wrong emitted tokens goes wrong for good), and under which epoch it was computed, so that a stale one
shows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from splitwise_sched.types import Request, SamplingParams

MODEL = "none"
NUM_EPOCHS = 1 << 12  # told apart in a token; each loss of a record costs a hundred
NUM_VALUES = 1 << 19
LONG_PART = 0.12
CANCELLED_PART = 0.02
CLASSES = ("interactive", "default", "batch")


def values(prompt: Sequence[int], emitted: Sequence[int] = ()) -> Iterator[int]:
    """Values of the answer to ``prompt`` from position ``len(emitted)`` on, without end.

    Args:
        emitted: the tokens before, as an instance gets them.
    """
    state = 0x9E3779B97F4A7C15
    for token in prompt:
        state = _mix(state, token)
    for token in emitted:
        state = _mix(state, token // NUM_EPOCHS)
    while True:
        value = state % NUM_VALUES
        yield value
        state = _mix(state, value)


def _mix(state: int, value: int) -> int:
    state = (state ^ value) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return state ^ state >> 29


def token_of(value: int, epoch: int) -> int:
    return value * NUM_EPOCHS + epoch % NUM_EPOCHS


@dataclass(frozen=True, slots=True)
class Ask:
    """One user's request.

    Attributes:
        cancel_after: tokens after which its user goes away; None for a user that stays.
    """

    request_id: str
    prompt: tuple[int, ...]
    num_tokens: int
    cancel_after: int | None
    priority: str
    tenant: str
    prefer: tuple[str, ...]

    def to_request(self, timeout_s: float) -> Request:
        sampling = SamplingParams(max_tokens=self.num_tokens, temperature=0.0)
        return Request(
            self.request_id, MODEL, self.prompt, sampling, timeout_s=timeout_s, priority=self.priority,
            tenant=self.tenant, prefer=self.prefer,
        )  # fmt: skip


def ask_of(request_id: str) -> Ask:
    draw = random.Random(hashlib.blake2b(request_id.encode(), digest_size=8).digest())
    num_tokens = draw.randint(60, 120) if draw.random() < LONG_PART else draw.randint(1, 16)
    return Ask(
        request_id=request_id,
        prompt=tuple(draw.randrange(1 << 30) for _ in range(draw.randint(1, 48))),
        num_tokens=num_tokens,
        cancel_after=draw.randint(1, num_tokens) if draw.random() < CANCELLED_PART else None,
        priority=draw.choice(CLASSES),
        tenant=draw.choice(("", "red", "blue")),
        prefer=(f"prefill{draw.randrange(3)}",) if draw.random() < 0.1 else (),
    )


def fault_in(ask: Ask, tokens: Sequence[int], *, complete: bool) -> str | None:
    """What is wrong with the tokens that a user got; None when they are the right answer, or the beginning of it."""
    if complete and len(tokens) != ask.num_tokens:
        return f"{len(tokens)} tokens instead of {ask.num_tokens}"
    if len(tokens) > ask.num_tokens:
        return f"{len(tokens)} tokens, and {ask.num_tokens} were asked for"
    epoch = 0
    for position, (token, value) in enumerate(zip(tokens, values(ask.prompt), strict=False)):
        if token // NUM_EPOCHS != value:
            return f"the token at position {position} is {token // NUM_EPOCHS} instead of {value}"
        if token % NUM_EPOCHS < epoch:
            return f"the token at position {position} is of epoch {token % NUM_EPOCHS}, after one of epoch {epoch}"
        epoch = token % NUM_EPOCHS
    return None
