"""Every error that the control plane raises. What a user sees says what was wrong, with which value, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class SplitwiseError(Exception):
    """Base of all; ``str(exc)`` is one paragraph for the user.

    Attributes:
        retryable: nothing can have happened; the same call may be made again.
    """

    retryable = False


class InvalidRequest(SplitwiseError):
    """A request that no instance could serve; ``param`` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class DuplicateRequest(InvalidRequest):
    """A request id that this topic has seen, and still has a record of."""

    def __init__(self, request_id: str, state: str) -> None:
        super().__init__(
            f"request id {request_id!r} was used before (its state is {state!r}): give every request an id of its own",
            param="request_id",
        )
        self.request_id = request_id
        self.state = state


class QueueFull(SplitwiseError):
    """The topic's queue is at its limit; the request was not taken."""

    retryable = True

    def __init__(self, depth: int, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"the queue holds {depth} requests, its limit is {limit}: try again in {retry_after_s:.0f} s, "
            "or start more instances"
        )
        self.depth, self.limit, self.retry_after_s = depth, limit, retry_after_s


class DeadlineUnreachable(QueueFull):
    """At the rate of late, the request would not end before its deadline; it was not taken."""

    def __init__(self, depth: int, limit: int, wait_s: float, timeout_s: float) -> None:
        super().__init__(depth, limit, min(60.0, wait_s - timeout_s + 1))
        self.args = (
            f"the queue holds {depth} requests, and at the rate of late this one would take {wait_s:.0f} s, which is "
            f"more than its {timeout_s:.0f} s: give it more time, try again in {self.retry_after_s:.0f} s, or start "
            "more instances",
        )
        self.wait_s, self.timeout_s = wait_s, timeout_s


class ConfigError(SplitwiseError):
    """A setting or flag, or several together, that cannot work."""


class StoreUnavailable(SplitwiseError):
    """Redis cannot be reached, or answers with an error that is not about the request."""

    retryable = True


class CommandRefused(StoreUnavailable):
    """Redis answers, and says no: out of memory, a missing group, an access rule."""

    retryable = False


class StoreUnsuitable(ConfigError):
    """Redis answers, but its version, eviction policy or access rules cannot carry the queue."""


class IncompatibleInstance(ConfigError):
    """Another live instance of the topic has a KV layout or model that this one's KV cannot be exchanged with."""

    def __init__(self, field: str, mine: str, theirs: str, other_instance: str, topic: str) -> None:
        super().__init__(
            f"this instance has {field} {mine!r}, but {other_instance} on topic {topic!r} has {theirs!r}, so their KV "
            f"caches cannot be exchanged: start this one with {field} {theirs!r}, or on another --scheduler-topic"
        )
        self.field, self.mine, self.theirs, self.other_instance = field, mine, theirs, other_instance


class NoShardLeft(IncompatibleInstance):
    """Every shard of the topic serves another model or KV layout than this instance has."""

    def __init__(self, model: str, topic: str, kinds: Sequence[str]) -> None:
        ConfigError.__init__(
            self,
            f"this instance serves {model!r}, and every shard of topic {topic!r} has others, whose KV caches cannot be "
            f"exchanged with its own ({'; '.join(kinds)}): raise --scheduler-shards in all processes of the topic, or "
            "start this one on another --scheduler-topic",
        )
        self.model, self.kinds = model, tuple(kinds)


class UnknownModel(InvalidRequest):
    """A model that no instance of the topic serves.

    Attributes:
        served: names of those that are.
    """

    def __init__(self, model: str, served: Sequence[str]) -> None:
        super().__init__(f"there is no model {model[:200]!r} here; served are: {', '.join(served)}", param="model")
        self.model, self.served = model, tuple(served)


class Fenced(SplitwiseError):
    """This instance outlived its lease; what it held now belongs to others."""


class RequestFailed(SplitwiseError):
    """A request that ended without its answer; raised to whoever reads its stream.

    Attributes:
        extra: see Output.extra; None when no instance ended it.
    """

    def __init__(self, request_id: str, reason: str, detail: str, *, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"request {request_id} {reason}: {detail}")
        self.request_id, self.reason, self.detail, self.extra = request_id, reason, detail, extra
