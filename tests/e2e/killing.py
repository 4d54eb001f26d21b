"""An instance is killed while it holds requests, and every user still gets the right tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from engine.demo.fleet import Fleet, Member
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.types import Request
from tests.integration.toy import tokens_of, until

ROUND_TRIPS = 5


async def start_two_pairs(fleet: Fleet, model: Path, flags: Sequence[str]) -> None:
    """Two prefill and two decode instances, which serve when it returns."""
    for role in ("prefill", "decode"):
        for index in range(2):
            fleet.start_instance(role, index, model, flags)
    await fleet.wait_for_instances(4)


def processes_of(member: Member) -> list[psutil.Process]:
    """Its own and all below it."""
    top = psutil.Process(member.process.pid)
    return [top, *top.children(recursive=True)]


async def kill_one_under_load(
    fleet: Fleet,
    requests: Sequence[Request],
    victim: str,
    expected: Mapping[str, Sequence[int]],
    was_hit: Callable[[Mapping[str, str]], bool] = lambda record: int(record["attempts"]) > 1,
) -> None:
    """
    Args:
        victim: the role of the instance that is killed, prefill or decode, while it has a request in hand. With all
            its processes, as when its machine dies.
        was_hit: whether a request's record tells that the kill cost it something.
    """
    trees = {name: processes_of(member) for name, member in fleet.members.items()}
    async with FrontEnd(fleet.settings) as frontend:
        streams = [await frontend.submit(r) for r in requests]
        answers = [asyncio.create_task(tokens_of(s, 240)) for s in streams]

        def is_in_hand(stream: OutputStream, record: Mapping[str, str]) -> bool:
            num_tokens = len(stream.assembly.token_ids)
            under_way = num_tokens > 10 if victim == "decode" else num_tokens == 0
            return under_way and record.get("state") == victim

        async def caught() -> str | None:
            """The name of an instance that stands still with a request in hand."""
            for stream in streams:
                record = await frontend.request_record(stream.request_id)
                if not is_in_hand(stream, record):
                    continue
                name = record[victim].rpartition("-")[0]
                # What drives an engine stops last: it passes on what the engine had said until then.
                for process in reversed(trees[name]):
                    process.suspend()
                # What it had sent until then, Redis reads first: that may be the request's end.
                for _ in range(ROUND_TRIPS):
                    record = await frontend.request_record(stream.request_id)
                if is_in_hand(stream, record):
                    return name
                for process in trees[name]:
                    process.resume()
            return None

        name = await until(caught, 60)
        member = fleet.members.pop(name)
        for process in trees[name]:
            process.kill()
        await asyncio.to_thread(member.process.wait)
        got = await asyncio.gather(*answers)
        records = [await frontend.request_record(r.request_id) for r in requests]
    fleet.check()
    assert {r.request_id: a for r, a in zip(requests, got, strict=True)} == expected
    hit = [r for r in records if was_hit(r)]
    assert hit and all(name in r.get("history", r["prefill"]) for r in hit), records
    assert {r["state"] for r in records} == {"done"}
