"""What the routes need of HTTP: bounded bodies, request ids, event streams, clients that go away."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitwise_sched.errors import InvalidRequest
from splitwise_sched.gateway.errors import ApiError
from splitwise_sched.types import check_id

BODY_TIMEOUT_S = 60.0
KEEP_ALIVE_S = 15.0
REQUEST_ID_HEADER = "x-request-id"
# A client that sends a little too much hears so after it has sent it, since few listen before.
_DRAINED_BYTES = 64 << 20

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


class RequestIds:
    """ASGI wrapper: every request has an id, in ``scope["state"]["request_id"]`` and in the answer's header.

    A client's own id stands in the state as it came; what is not an id is not sent back.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID_HEADER.encode()), None)
        own = f"req-{secrets.token_hex(12)}"
        request_id = own if given is None else given.decode("latin-1")
        try:
            shown = check_id("request", request_id)
        except InvalidRequest:
            shown = own
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER.encode(), shown.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


def json_response(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(body), status, dict(headers or {}), media_type="application/json")


def to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def check_key(request: Request, key: str | None) -> None:
    """Raises ApiError (401) unless the request carries ``key``; None is no key."""
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Compared as bytes, in a time that does not depend on how much of it is right.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise ApiError(
            401, "the API key is missing or wrong: send the header `Authorization: Bearer KEY`",
            type="authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


async def read_body(request: Request, limit: int) -> bytes:
    """
    Raises:
        ApiError: 413 for a body larger than ``limit`` bytes, 408 for one that does not come.
        starlette.requests.ClientDisconnect: the client went away.
    """
    try:
        return await asyncio.wait_for(_read_body(request, limit), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the request body did not come within {BODY_TIMEOUT_S:.0f} s", code="timeout") from None


async def _read_body(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() else 0
    chunks: list[bytes] = []
    if size <= _DRAINED_BYTES:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif size > _DRAINED_BYTES:
                break
    if size > limit:
        raise ApiError(
            413, f"the request body has more than {limit} bytes (--max-body-bytes): send less",
            code="body_too_large", headers={"Connection": "close"},
        )  # fmt: skip
    return b"".join(chunks)


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of ``work``, which is cancelled, and has ended, when this raises ClientGone. The body must be read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for pending in (task, watch):
            pending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await pending


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. When the client goes away, ``events`` is closed, and ClientGone raised.

    Args:
        events: each a body for a ``data:`` line. While none comes, a comment keeps the connection alive.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(self._send_all(send), receive)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        keeper = asyncio.ensure_future(self._keep_alive(send))
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await self._send_part(send, b"data: " + data + b"\n\n")
        finally:
            keeper.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        while True:
            await asyncio.sleep(max(0.0, self._sent_at + KEEP_ALIVE_S - loop.time()))
            if loop.time() - self._sent_at >= KEEP_ALIVE_S:
                await self._send_part(send, b": waiting\n\n")

    async def _send_part(self, send: Send, part: bytes) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": part, "more_body": True})
