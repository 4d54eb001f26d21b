"""The gateway's routes, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from splitwise_sched.errors import InvalidRequest, QueueFull, SplitwiseError
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.gateway.answer_text import Piece
from splitwise_sched.gateway.calls import Call, ChatCall, CompletionCall, parse_call
from splitwise_sched.gateway.errors import INTERNAL, ApiError, as_api_error
from splitwise_sched.gateway.http import (
    ClientGone,
    EventStream,
    RequestIds,
    check_key,
    json_response,
    read_body,
    to_json,
    unless_gone,
)
from splitwise_sched.gateway.metrics import GatewayMetrics, RequestTimer
from splitwise_sched.gateway.models import ServedModels, limits, missing_roles
from splitwise_sched.gateway.service import Answer, CompletionService
from splitwise_sched.gateway.settings import GatewaySettings
from splitwise_sched.tokenizer import Tokenizer
from splitwise_sched.types import check_id

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 2.0
_OUTCOMES = {400: "invalid", 401: "unauthorized", 404: "not_found", 408: "invalid", 409: "duplicate", 413: "invalid",
             429: "rejected", 503: "unavailable", 504: "expired"}  # fmt: skip
AnyCall = TypeVar("AnyCall", CompletionCall, ChatCall)


def create_app(frontend: FrontEnd, settings: GatewaySettings, tokenizer: Tokenizer | None) -> ASGIApp:
    """
    Args:
        frontend: started; the caller closes it after the last request.
        tokenizer: the one in ``settings.model``.
    """
    routes = _Routes(frontend, settings, tokenizer)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat_completions, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.list_models),
            Route("/v1/models/{name:path}", routes.get_model),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics_page),
        ],
        exception_handlers={HTTPException: _no_such_route},
    )
    return RequestIds(app)


class _Completion:
    """One POST as an ASGI application of its own, since its answer may be a stream whose end has an outcome."""

    def __init__(self, metrics: GatewayMetrics, route: str, respond: Callable[[RequestTimer], Awaitable[Response]]):
        self._metrics = metrics
        self._route = route
        self._respond = respond
        self.outcome = "ok"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._metrics.timing() as timer:
            try:
                response = await self._respond(timer)
                await response(scope, receive, send)
            except (ClientGone, ClientDisconnect):
                self.outcome = "cancelled"
            except asyncio.CancelledError:
                self.outcome = "cancelled"
                raise
            except Exception as exc:
                await self.error_response(exc)(scope, receive, send)
            finally:
                self._metrics.requests.labels(self._route, self.outcome).inc()

    def error_response(self, exc: Exception) -> Response:
        error = self.note(exc)
        return json_response(error.body, error.status, error.headers)

    def note(self, exc: Exception) -> ApiError:
        """What ``exc`` means to the client, counted as the outcome."""
        error = _as_api_error(exc)
        self.outcome = _OUTCOMES.get(error.status, "failed")
        if isinstance(exc, QueueFull):
            self._metrics.queue_rejects.inc()
        return error


class _Routes:
    def __init__(self, frontend: FrontEnd, settings: GatewaySettings, tokenizer: Tokenizer | None) -> None:
        self._frontend = frontend
        self._max_body_bytes = settings.max_body_bytes
        self._api_key = None if settings.api_key is None else settings.api_key.get_secret_value()
        self._service = CompletionService(frontend, ServedModels(frontend, tokenizer), settings)
        self._metrics = GatewayMetrics()
        self._metrics.unconfirmed_submits.set_function(lambda: frontend.num_unconfirmed)
        self._started = int(time.time())

    # ---- completions ---------------------------------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> _Completion:
        return self._completion(request, "/v1/chat/completions", ChatCall)

    async def completions(self, request: Request) -> _Completion:
        return self._completion(request, "/v1/completions", CompletionCall)

    def _completion(self, request: Request, route: str, kind: type[AnyCall]) -> _Completion:
        async def respond(timer: RequestTimer) -> Response:
            check_key(request, self._api_key)
            request_id = _checked_id(request.state.request_id)
            call = parse_call(kind, await read_body(request, self._max_body_bytes))
            submitting = self._service.submit(call, request_id, timer)
            if call.stream:
                answer = await unless_gone(submitting, request.receive)
                return EventStream(_events(answer, call, completion))
            return await unless_gone(_whole(submitting), request.receive)

        completion: _Completion = _Completion(self._metrics, route, respond)
        return completion

    # ---- the rest ------------------------------------------------------------------------------------------------

    async def list_models(self, request: Request) -> Response:
        try:
            check_key(request, self._api_key)
            served = limits(await self._frontend.instances())
        except (ApiError, SplitwiseError) as exc:
            return _error_response(exc)
        return json_response({"object": "list", "data": [self._model_card(*item) for item in served.items()]})

    def _model_card(self, name: str, max_model_len: int) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "splitwise-sched",
            "max_model_len": max_model_len,
        }

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            check_key(request, self._api_key)
            served = limits(await self._frontend.instances())
            if name not in served:
                known = ", ".join(served) or "none"
                raise ApiError(404, f"there is no model {name[:200]!r} here; served are: {known}",
                               param="model", code="model_not_found")  # fmt: skip
        except (ApiError, SplitwiseError) as exc:
            return _error_response(exc)
        return json_response(self._model_card(name, served[name]))

    async def health(self, request: Request) -> Response:
        """200 when a request would find all that it needs; else 503, and what is missing."""
        try:
            shards = await asyncio.wait_for(self._frontend.instances_by_shard(), HEALTH_TIMEOUT_S)
        except (SplitwiseError, asyncio.TimeoutError):
            lost = {"status": "unavailable", "redis": "unreachable", "missing": ["redis"]}
            return json_response(lost, 503, {"Retry-After": "1"})
        missing = missing_roles(shards)
        counts = Counter(record.role.value for records in shards for record in records)
        body: dict[str, object] = {
            "status": "unavailable" if missing else "ok",
            "redis": "ok",
            "topic": self._frontend.settings.scheduler_topic,
            "instances": {role: counts[role] for role in ("prefill", "decode", "mixed")},
            "missing": missing,
        }
        return json_response(body, 503 if missing else 200, {"Retry-After": "1"} if missing else None)

    async def metrics_page(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), media_type=self._metrics.content_type)


async def _whole(submitting: Awaitable[Answer]) -> Response:
    answer = await submitting
    try:
        pieces: list[Piece] = [piece async for piece in answer.pieces()]
        return json_response(answer.shape.whole(pieces, answer.usage))
    finally:
        await answer.close()


async def _events(answer: Answer, call: Call, completion: _Completion) -> AsyncGenerator[bytes, None]:
    """The data of an answer's events. What goes wrong from here on is told in the stream."""
    try:
        for chunk in answer.shape.opening():
            yield to_json(chunk)
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                yield to_json(answer.shape.chunk(piece))
        if call.include_usage:
            yield to_json(answer.shape.usage_chunk(answer.usage))
        yield b"[DONE]"
    except Exception as exc:
        yield to_json(completion.note(exc).body)
    finally:
        await answer.close()


def _checked_id(request_id: str) -> str:
    try:
        return check_id("request", request_id)
    except InvalidRequest as exc:
        raise ApiError(400, str(exc), param="X-Request-Id") from exc


def _as_api_error(exc: Exception) -> ApiError:
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, SplitwiseError):
        return as_api_error(exc)
    logger.error("a request failed in a way that was not foreseen", exc_info=exc)
    return ApiError(500, "the gateway failed on this request; its log says why", type=INTERNAL)


def _error_response(exc: Exception) -> Response:
    error = _as_api_error(exc)
    return json_response(error.body, error.status, error.headers)


async def _no_such_route(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    method, path = request.method, request.url.path[:200]
    allowed = (exc.headers or {}).get("Allow")
    remedy = f"use {allowed}" if allowed else "see /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics"
    message = f"{method} {path}: {exc.detail}; {remedy}"
    return json_response(ApiError(exc.status_code, message).body, exc.status_code, exc.headers)
