"""One connection's pipelines over a real socket: order, silence, garbage, a peer that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from splitwise_sched.resp import PythonReader, ReplyError, pack
from splitwise_sched.wire import Wire, WireLost
from tests.integration.toy import ToyInstance, settings_for, tokens_of, toy_answer

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
PING = pack(("PING",))


@asynccontextmanager
async def wire_to(serve: Server) -> AsyncIterator[Wire]:
    ended = asyncio.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()
            ended.set()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    wire = Wire(writer.transport)
    try:
        yield wire
    finally:
        wire.close()
        await asyncio.wait_for(ended.wait(), 10)
        server.close()
        await server.wait_closed()


async def until_it_closes(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


async def test_pipelines_get_their_own_replies_in_order_whatever_the_pieces():
    async def serve(reader, writer):
        await reader.readexactly(3 * len(PING))
        for byte in b"+one\r\n-ERR no\r\n$2\r\n\xff\xfe\r\n":
            writer.write(bytes([byte]))
            await writer.drain()
        await until_it_closes(reader)

    async with wire_to(serve) as wire:
        first = wire.send(PING * 2, [False, False], 10)
        second = wire.send(PING, [True], 10)
        one, error = await first
        assert one == "one"
        assert isinstance(error, ReplyError)
        assert await second == [b"\xff\xfe"]


async def test_a_push_is_the_reply_to_no_command():
    async def serve(reader, writer):
        await reader.readexactly(len(PING))
        writer.write(b">2\r\n+moving\r\n:1\r\n+PONG\r\n")
        await until_it_closes(reader)

    async with wire_to(serve) as wire:
        assert await wire.send(PING, [False], 10) == ["PONG"]


async def test_a_cancelled_pipeline_keeps_its_replies_from_the_next():
    go = asyncio.Event()

    async def serve(reader, writer):
        await reader.readexactly(len(PING))
        await go.wait()
        writer.write(b"+late\r\n")
        await reader.readexactly(len(PING))
        writer.write(b"+mine\r\n")
        await until_it_closes(reader)

    async with wire_to(serve) as wire:
        wire.send(PING, [False], 10).cancel()
        go.set()
        assert await wire.send(PING, [False], 10) == ["mine"]


async def test_silence_breaks_the_connection_for_all_that_is_due():
    async with wire_to(lambda reader, _: until_it_closes(reader)) as wire:
        due = [wire.send(PING, [False], 0.05), wire.send(PING, [False], 10)]
        for future in due:
            with pytest.raises(WireLost, match=r"no reply came for 0.05 s"):
                await asyncio.wait_for(future, 10)
        with pytest.raises(WireLost):
            await wire.send(PING, [False], 10)


async def test_replies_that_keep_coming_are_no_silence():
    async def serve(reader, writer):
        await reader.readexactly(len(PING))
        for byte in b"$6\r\nslowly\r\n":
            await asyncio.sleep(0.1)
            writer.write(bytes([byte]))
        await until_it_closes(reader)

    async with wire_to(serve) as wire:
        assert await wire.send(PING, [False], 1.0) == ["slowly"]


@pytest.mark.parametrize("answer", [b"", b"$10\r\nhalf"])
async def test_a_peer_that_goes_away_fails_what_is_due(answer):
    async def serve(reader, writer):
        await reader.readexactly(len(PING))
        writer.write(answer)

    async with wire_to(serve) as wire:
        with pytest.raises(WireLost):
            await asyncio.wait_for(wire.send(PING, [False], 10), 10)
        assert wire.lost is not None


async def test_a_peer_that_speaks_something_else_is_left():
    async def serve(reader, writer):
        await reader.readexactly(len(PING))
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await until_it_closes(reader)

    async with wire_to(serve) as wire:
        with pytest.raises(WireLost, match="not Redis protocol"):
            await asyncio.wait_for(wire.send(PING, [False], 10), 10)


async def test_the_scheduler_works_without_hiredis(monkeypatch, redis_server, topic):
    from splitwise_sched import resp
    from splitwise_sched.frontend import FrontEnd
    from splitwise_sched.types import Request, Role, SamplingParams

    monkeypatch.setattr(resp, "hiredis", None)
    assert isinstance(resp.new_reader(), PythonReader)
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p"),
        ToyInstance(settings, Role.DECODE, "d"),
        FrontEnd(settings) as frontend,
    ):
        request = Request("r", "toy", (3, 4, 5), SamplingParams(max_tokens=5, temperature=0))
        stream = await frontend.submit(request)
        assert await tokens_of(stream) == toy_answer(request)
