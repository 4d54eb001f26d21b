"""An instance is killed while it holds requests, and every user still gets the right tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from engine.demo.fleet import Fleet
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.types import Request


async def tokens_of(stream: OutputStream) -> list[int]:
    return [token for output in [o async for o in stream] for token in output.token_ids]


async def first(condition: Callable[[], Awaitable[str | None]]) -> str:
    """The first thing that ``condition`` gives; it looks at other processes, so there is nothing to await."""

    async def poll() -> str:
        while (found := await condition()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return found

    return await asyncio.wait_for(poll(), 60)


async def kill_one_under_load(
    fleet: Fleet,
    requests: Sequence[Request],
    victim: str,
    kill: Callable[[str], None],
    expected: Mapping[str, Sequence[int]],
) -> None:
    """
    Args:
        victim: the role of the instance that is killed, prefill or decode, while a request is on it.
        kill: ends the member of the fleet that has this name.
    """
    async with FrontEnd(fleet.settings) as frontend:
        streams = [await frontend.submit(r) for r in requests]
        answers = [asyncio.create_task(tokens_of(s)) for s in streams]

        async def held() -> str | None:
            """The instance that a request is on at this moment, when it is of the victim's role."""
            for stream in streams:
                half = stream.request.sampling.max_tokens // 2
                under_way = victim == "prefill" or 10 < len(stream.assembly.token_ids) < half
                record = await frontend.request_record(stream.request_id)
                if under_way and record.get("state") == victim:
                    return record[victim]
            return None

        name = (await first(held)).rpartition("-")[0]
        kill(name)
        got = await asyncio.wait_for(asyncio.gather(*answers), 180)
        records = [await frontend.request_record(r.request_id) for r in requests]
    fleet.check()
    assert {r.request_id: a for r, a in zip(requests, got, strict=True)} == expected
    rerun = [r for r in records if int(r["attempts"]) > 1]
    assert rerun and all(name in r["history"] for r in rerun), [r.get("history") for r in rerun]
    assert {r["state"] for r in records} == {"done"}
