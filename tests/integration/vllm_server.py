"""A small HTTP server that speaks vLLM's API on real sockets, and misbehaves when it is told to.

What it answers is made of the whole sequence so far, so that a run that goes on elsewhere has to come out the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from engine.vllm.params import decode_params
from kv_transfer.endpoint import RankEndpoint, endpoints_to_text
from kv_transfer.identity import ProcessIdentity, host_id, process_start
from kv_transfer.layout import KVLayout
from kv_transfer.protocol import WIRE_VERSION

MODEL = "small"
VOCABULARY = 1000
LAYOUT = KVLayout(
    engine="vllm-0.32.0-cpu", model="f" * 32, dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=16,
    num_blocks=500,
)  # fmt: skip


def tokens_after(sequence: Iterable[int], count: int) -> list[int]:
    """What the server answers to this prompt."""
    total, length = 0, 0
    for token in sequence:
        total, length = total + token, length + 1
    tokens = []
    for _ in range(count):
        tokens.append((total * 31 + length) % VOCABULARY)
        total, length = total + tokens[-1], length + 1
    return tokens


class SmallVllm:
    """
    Attributes:
        health, version, models, num_engines, num_loads_failed: what it says of itself.
        has_connector: whether it answers with ``kv_transfer_params``.
        holds: says nothing more, on new and old connections, until this is unset.
        hold_after: so many tokens of a stream come; the others after ``release``.
        pause_s: before each token of a stream.
        fault: called with the body of a completion; what it returns is sent as it is, None: the usual answer.
        bodies: of all completions.
        num_open: completions under way.
        num_left: streams that were left by their client.
    """

    def __init__(self, layout: KVLayout = LAYOUT, *, api_key: str | None = None) -> None:
        self.layout = layout
        self.port = 0
        self.health = 200
        self.version: Any = {"version": "0.32.0"}
        self.models: Any = {"data": [{"id": MODEL, "root": "/no/such/model", "max_model_len": 2000}]}
        self.num_engines = 1
        self.num_loads_failed = 0
        self.has_connector = True
        self.api_key = api_key
        self.hold_after: int | None = None
        self.num_open = 0
        self.pause_s = 0.0
        self._may_speak = asyncio.Event()
        self._may_speak.set()
        self._may_be_well = asyncio.Event()
        self._may_be_well.set()
        self._go_on = asyncio.Event()
        self.fault: Callable[[dict[str, Any]], bytes | None] = lambda body: None
        self.bodies: list[dict[str, Any]] = []
        self.num_left = 0
        self.endpoints = ""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> SmallVllm:
        """Listen, on the port of last time if there was one; as a server that was started anew."""
        self.exchange()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def exchange(self) -> None:
        """As if another server were at the address from now on."""
        identity = ProcessIdentity(host_id(), os.getpid(), process_start(os.getpid()) or 0)
        endpoint = RankEndpoint(
            "small", "127.0.0.1", 9, secrets.token_hex(16), identity, self.layout, WIRE_VERSION, {"tcp": {"port": 9}}
        )
        self.endpoints = endpoints_to_text([endpoint])

    @property
    def holds(self) -> bool:
        return not self._may_speak.is_set()

    @holds.setter
    def holds(self, value: bool) -> None:
        if value:
            self._may_speak.clear()
        else:
            self._may_speak.set()

    def hold_health(self) -> None:
        """``/health`` is not answered any more, all else is."""
        self._may_be_well.clear()

    def release(self) -> None:
        """Hold nothing any more."""
        self.holds, self.hold_after = False, None
        self._go_on.set()

    async def kill(self) -> None:
        """Nobody listens, and all connections are reset."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> SmallVllm:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.kill()

    def of(self, **fields: Any) -> list[dict[str, Any]]:
        """Bodies whose kv_transfer_params have these fields."""
        return [b for b in self.bodies if fields.items() <= (b.get("kv_transfer_params") or {}).items()]

    # ---- HTTP ----------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                raw = await reader.readexactly(int(headers.get("content-length", "0")))
                path = lines[0].split()[1]
                self.num_open += path == "/v1/completions"
                writer.write(await self._answer(path, headers, raw, reader, writer))
                await writer.drain()
                self.num_open -= path == "/v1/completions"
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.close()

    async def _answer(
        self, path: str, headers: dict[str, str], raw: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        if path == "/v1/completions":
            self.bodies.append(json.loads(raw))
        await self._may_speak.wait()
        is_guarded = self.api_key is not None and path.startswith("/v1")
        if is_guarded and headers.get("authorization") != f"bearer {self.api_key}".lower():
            return answer(401, {"error": "Unauthorized"})
        if path == "/health":
            await self._may_be_well.wait()
            return answer(self.health, {})
        if path == "/version":
            return self.version if isinstance(self.version, bytes) else answer(200, self.version)
        if path == "/v1/models":
            return answer(200, self.models)
        if path == "/metrics":
            return answer(200, self._metrics().encode())
        body = json.loads(raw)
        if (fault := self.fault(body)) is not None:
            writer.write(fault)
            writer.close()
            return b""
        if body["stream"]:
            return await self._stream(body, reader, writer)
        transfer = body["kv_transfer_params"]
        told = decode_params(transfer["transfer_id"], self.endpoints, len(body["prompt"]))
        first = chunk(body, 0, tokens_after(body["prompt"], 1))
        return answer(200, {**first, "kv_transfer_params": told if self.has_connector else None})

    async def _stream(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        tokens = tokens_after(body["prompt"], body["max_tokens"])
        try:
            for index in range(len(tokens)):
                if index == self.hold_after:
                    await self._hold(reader)
                await self._may_speak.wait()
                await asyncio.sleep(self.pause_s)
                writer.write(chunked(event(chunk(body, index, tokens[index : index + 1]))))
                await writer.drain()
        except ConnectionError:
            self.num_left += 1
            raise
        return chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    async def _hold(self, reader: asyncio.StreamReader) -> None:
        """Until ``release``, or until the client has gone."""
        gone, going_on = asyncio.create_task(reader.read(1)), asyncio.create_task(self._go_on.wait())
        try:
            await asyncio.wait((gone, going_on), return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ConnectionResetError
        finally:
            gone.cancel()
            going_on.cancel()

    def _metrics(self) -> str:
        lines = ["# TYPE vllm:num_requests_running gauge"]
        for engine in range(self.num_engines):
            labels = f'{{engine="{engine}",model_name="{MODEL}"}}'
            lines += [f"vllm:num_requests_running{labels} 3.0", f"vllm:num_requests_waiting{labels} 2.0"]
            lines += [f"vllm:kv_cache_usage_perc{labels} 0.25", f"vllm:prompt_tokens_total{labels} 1e+06"]
            lines.append(f"vllm:splitwise_kv_loads_failed_total{labels} {float(self.num_loads_failed)}")
        return "\n".join(lines) + "\n"


def chunk(body: dict[str, Any], index: int, tokens: list[int]) -> dict[str, Any]:
    """These tokens of the answer to ``body``, of which the first is the one at ``index``."""
    choice: dict[str, Any] = {"index": 0, "text": "", "token_ids": tokens, "finish_reason": None, "stop_reason": None}
    if index + len(tokens) == body["max_tokens"]:
        choice["finish_reason"] = "length"
    if body.get("logprobs") is not None:
        tops = [{f"token_id:{t}": -0.5, "token_id:7": -1.5, "token_id:8": -9999.0} for t in tokens]
        choice["logprobs"] = {"token_logprobs": [-0.5 for _ in tokens], "top_logprobs": tops}
    return {"id": "cmpl-x", "object": "text_completion", "model": body["model"], "choices": [choice]}


def answer(status: int, body: Any) -> bytes:
    """A whole response; ``body`` is sent as JSON, or as it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def stream_of(*events: bytes) -> bytes:
    """A whole response of these events, which ends there."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    return head + b"".join(events)


def event(payload: Any) -> bytes:
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def other_layout(**changes: Any) -> KVLayout:
    return replace(LAYOUT, **changes)
