"""What the gateway answers when it does not answer: OpenAI's error shape, with a status that clients act on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from splitwise_sched.errors import (
    DuplicateRequest,
    InvalidRequest,
    QueueFull,
    RequestFailed,
    SplitwiseError,
    StoreUnavailable,
    UnknownModel,
)

RETRY_AFTER_S = 5
INVALID, UNAVAILABLE, INTERNAL = "invalid_request_error", "service_unavailable_error", "server_error"


class ApiError(Exception):
    """An error answer.

    Attributes:
        type, param, code: as OpenAI's clients know them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unavailable(message: str, code: str) -> ApiError:
    """503 with Retry-After: nothing is wrong with the request."""
    return ApiError(503, message, type=UNAVAILABLE, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def as_api_error(exc: SplitwiseError) -> ApiError:
    """The answer that ``exc`` becomes."""
    if isinstance(exc, DuplicateRequest):
        return ApiError(409, str(exc), param="X-Request-Id", code="duplicate_request_id")
    if isinstance(exc, UnknownModel):
        return ApiError(404, str(exc), param="model", code="model_not_found")
    if isinstance(exc, InvalidRequest):
        return ApiError(400, str(exc), param=exc.param)
    if isinstance(exc, QueueFull):
        seconds = str(max(1, math.ceil(exc.retry_after_s)))
        return ApiError(429, str(exc), type="rate_limit_error", code="queue_full", headers={"Retry-After": seconds})
    if isinstance(exc, StoreUnavailable):
        return unavailable(str(exc), "store_unavailable")
    if isinstance(exc, RequestFailed):
        if exc.reason == "expired":
            return ApiError(504, str(exc), type="timeout_error", code="request_expired")
        if exc.reason == "cancelled":
            return unavailable(str(exc), "request_cancelled")
        return ApiError(500, str(exc), type=INTERNAL, code="request_failed")
    return ApiError(500, str(exc), type=INTERNAL)
