"""The values that cross the control plane: frozen, without I/O, and known to every other module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from splitwise_sched.errors import InvalidRequest

ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
CLASS_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,32}")
MAX_STOP_STRINGS = 16
MAX_PREFER = 8
MAX_LOGPROBS = 20
MAX_TIMEOUT_S = 86400.0
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1


class Role(str, Enum):
    """What an instance does with a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class RequestState(str, Enum):
    """Where a request is; the field ``state`` of its record in Redis.

    ``LOST`` means that an instance which held it died: its front end gives it a higher epoch and puts it back.
    """

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    LOST = "lost"
    DONE = "done"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    ERROR = "error"


def check_id(kind: str, value: str) -> str:
    """``value``, when it may be an id of a ``kind`` (request, instance, front end, topic).

    Raises:
        InvalidRequest: it has characters that Redis keys and redis-cli users would trip over, or is too long.
    """
    if not ID_PATTERN.fullmatch(value):
        raise InvalidRequest(
            f"{kind} id {value[:160]!r} is not usable: give 1 to 128 characters of A-Z a-z 0-9 . _ : -", param=kind
        )
    return value


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How output tokens are chosen and when they end. Checked on construction (InvalidRequest names the field).

    Attributes:
        max_tokens: output tokens at most, over all re-runs of the request together.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        seed: every output position draws from a generator of (seed, position), so that a re-run goes on with the
            same draws. None is only allowed before submit: the front end puts a random one in.
        stop: output ends before the first of these strings, which is not part of the text.
        logprobs: None for none; n for the chosen token's logprob and those of the n most likely.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            self._refuse("max_tokens", "1 or more")
        if not 0.0 <= self.temperature <= 100.0:
            self._refuse("temperature", "between 0 (greedy) and 100")
        if not 0.0 < self.top_p <= 1.0:
            self._refuse("top_p", "above 0 and at most 1")
        if self.top_k < 0:
            self._refuse("top_k", "0 (all) or more")
        if self.seed is not None and not SEED_MIN <= self.seed <= SEED_MAX:
            self._refuse("seed", "a 64-bit integer")
        if self.stop and (len(self.stop) > MAX_STOP_STRINGS or any(not s or len(s) > 1024 for s in self.stop)):
            self._refuse("stop", f"at most {MAX_STOP_STRINGS} strings of 1 to 1024 characters")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            self._refuse("logprobs", f"between 0 and {MAX_LOGPROBS}")

    def _refuse(self, name: str, must: str) -> None:
        raise InvalidRequest(f"{name} is {getattr(self, name)!r}: it must be {must}", param=name)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation request, as a front end submits it and an engine sees it.

    Attributes:
        prompt_token_ids: [num_prompt_tokens]
        emitted_token_ids: output tokens that an earlier run of this request already gave to its user; the engine
            computes them as if they were prompt, and its first new token has output index ``len(emitted_token_ids)``.
        timeout_s: from submit to the last token, a day at most; the front end's default when None.
        priority: class of service, one of the front end's ``priority_classes``.
        tenant: inside a class, tenants share equally; "" is one of them.
        prefer: names or ids of instances that had better prefill it, best first; others take it after a while.
        metadata: what an embedding program wants to find again at its engine: JSON values, carried and not looked at;
            the bounds are codec.py's.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    emitted_token_ids: tuple[int, ...] = ()
    timeout_s: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    priority: str = "default"
    tenant: str = ""
    prefer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_id("request", self.request_id)
        if self.tenant:
            check_id("tenant", self.tenant)
        if len(self.prefer) > MAX_PREFER:
            raise InvalidRequest(f"prefer has {len(self.prefer)} instances: give {MAX_PREFER} at most", param="prefer")
        for instance in self.prefer:
            check_id("instance", instance)
        if not CLASS_PATTERN.fullmatch(self.priority):
            raise InvalidRequest(
                f"priority is {self.priority[:80]!r}: it must be the name of a class", param="priority"
            )
        if self.timeout_s is not None and not 0.0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise InvalidRequest(
                f"timeout_s is {self.timeout_s!r}: it must be above 0 and at most {MAX_TIMEOUT_S:.0f}; leave it out "
                "for the front end's default",
                param="timeout_s",
            )
        if not self.prompt_token_ids:
            raise InvalidRequest("the prompt has no tokens: give at least one", param="prompt")

    @property
    def input_token_ids(self) -> tuple[int, ...]:
        """What prefill computes: the prompt, and what was already emitted; [num_input_tokens]."""
        return self.prompt_token_ids + self.emitted_token_ids

    @property
    def num_input_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.emitted_token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Logprobs (natural log) at one output position.

    Attributes:
        top: the most likely tokens and their logprobs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


# Not frozen, for one is made for each token, and a frozen one takes four times as long to make.
@dataclass(slots=True, unsafe_hash=True)
class Output:
    """Some consecutive output tokens of one request, or its end, or both. Not to be changed: others may hold it.

    Attributes:
        index: output position of ``token_ids[0]``.
        logprobs: one a token when asked for, else empty.
        finish_reason: set on the last output of a request.
        stop_reason: the stop string or token id that matched.
        detail: why it ended, for the user, when it ended badly.
        stats: what the instance measured (``prefill_s``, ``transfer_s``, ``kv_bytes``, ``lane`` ...), on the last.
        extra: what an embedding program wants to find again at its front end: JSON values, carried and not looked at.
    """

    request_id: str
    epoch: int
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    detail: str | None = None
    stats: Mapping[str, float | int | str] | None = None
    extra: Mapping[str, Any] | None = None
