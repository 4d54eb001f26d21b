"""What a request is charged, and what is reserved for it."""

from __future__ import annotations

from splitwise_sched.errors import InvalidRequest
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.store import Flow
from splitwise_sched.types import Request


class Terms:
    """Those of one topic."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._class_weights = settings.class_weights
        self._num_reserved_decode_tokens = settings.num_reserved_decode_tokens

    def flow(self, request: Request) -> Flow:
        """Whose share it is charged to. Raises InvalidRequest when it names no class of this topic."""
        weights = self._class_weights
        if request.priority not in weights:
            raise InvalidRequest(
                f"priority is {request.priority!r}: the classes here are {', '.join(weights)}", param="priority"
            )
        return Flow(request.priority, weights[request.priority], request.tenant or "-")

    def kv_tokens(self, request: Request) -> int:
        """KV to reserve on decode: what comes in, and the part of the output that is promised room."""
        remaining = request.sampling.max_tokens - len(request.emitted_token_ids)
        return request.num_input_tokens + min(max(1, remaining), self._num_reserved_decode_tokens)
