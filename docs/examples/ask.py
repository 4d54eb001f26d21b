"""A front end on asyncio: python ask.py tour|answers [host:port] [number of prompts]

``tour`` makes each call once; ``answers`` asks all prompts at once and prints what toy_loop.py prints.
"""

import asyncio
import secrets
import sys

from toy_model import Prompt, prompts

from splitwise_sched import (
    DuplicateRequest,
    FrontEnd,
    InvalidRequest,
    QueueFull,
    Request,
    RequestFailed,
    SamplingParams,
    SchedulerSettings,
)


def request(tokens: tuple[int, ...], max_tokens: int, *, priority: str = "default", tenant: str = "") -> Request:
    """A request with an id that was never used before."""
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(secrets.token_hex(8), "toy", tokens, sampling, priority=priority, tenant=tenant)


async def stream(frontend: FrontEnd) -> None:
    tokens: list[int] = []
    async for output in await frontend.submit(request((1, 2, 3), 8)):
        tokens += output.token_ids  # what is new, as it comes: in order, no token twice
    print(f"streamed {len(tokens)} tokens, finish reason {output.finish_reason}")


async def cancel(frontend: FrontEnd) -> None:
    asked = request((4, 5), 3000)
    answer = await frontend.submit(asked)
    await anext(answer)
    await frontend.cancel(asked.request_id, "seen enough")  # by id, from any front end
    last = [output async for output in answer][-1]
    print(f"cancelled: {last.finish_reason}, {last.detail}")

    answer = await frontend.submit(request((4, 5), 3000))
    await anext(answer)
    await answer.aclose()  # for whoever holds the stream, when its own user goes away
    print(f"closed: its record says {(await frontend.request_record(answer.request_id))['state']}")


async def errors(frontend: FrontEnd, full: FrontEnd) -> None:
    asked = request((1,), 1)
    try:
        await frontend.submit(asked)
        await frontend.submit(asked)
    except DuplicateRequest as exc:
        print(f"duplicate: {exc}")
    try:
        await frontend.submit(request((1,), 1, priority="urgent"))
    except InvalidRequest as exc:
        print(f"invalid: {exc}")
    try:
        await full.submit(request((1,), 1))
    except QueueFull as exc:
        print(f"full: {exc.depth} wait of {exc.limit} that may; try again in {exc.retry_after_s:.0f} s")
    try:
        async for _ in await frontend.submit(request((1,) * 5000, 1)):
            pass
    except RequestFailed as exc:
        print(f"failed: {exc.reason}, {exc.detail}")


async def answers(frontend: FrontEnd, count: int) -> None:
    """All at once over the front end's three connections. Users share equally; one in ten goes before the others."""

    async def ask(i: int, prompt: Prompt) -> list[int]:
        priority = "interactive" if i % 10 == 0 else "batch"
        asked = request(prompt.token_ids, prompt.max_tokens, priority=priority, tenant=f"user-{i % 3}")
        return [token async for output in await frontend.submit(asked) for token in output.token_ids]

    asked = prompts(count)
    for prompt, tokens in zip(asked, await asyncio.gather(*map(ask, range(count), asked)), strict=True):
        print(prompt.name, *tokens)


async def main(what: str, address: str = "127.0.0.1:6379", count: str = "200") -> None:
    host, _, port = address.rpartition(":")
    settings = SchedulerSettings(scheduler_host=host, scheduler_port=int(port), scheduler_topic="toy")
    async with FrontEnd(settings) as frontend:
        if what == "answers":
            await answers(frontend, int(count))
        else:
            async with FrontEnd(settings.model_copy(update={"scheduler_max_size": 0})) as full:
                await stream(frontend)
                await cancel(frontend)
                await errors(frontend, full)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
