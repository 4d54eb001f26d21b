"""A gateway on a free port, and an instance that answers what a test tells it; Redis, HTTP and scheduling are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitwise_sched.gateway.server import GatewayServer
from splitwise_sched.gateway.settings import GatewaySettings
from splitwise_sched.instance import InstanceSession
from splitwise_sched.records import Dropped, InstanceEvent, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer
from splitwise_sched.types import FinishReason, Output, Request, Role, TokenLogprob

MODEL = "toy"
MAX_MODEL_LEN = 1000


@asynccontextmanager
async def gateway(scheduler: SchedulerSettings, **settings: Any) -> AsyncIterator[str]:
    """The URL of a gateway that listens on a free port."""
    server = GatewayServer(GatewaySettings(**{"port": 0, "shutdown_timeout_s": 5, **settings}), scheduler)
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(server.run(listening.set_result))
    try:
        await asyncio.wait((listening, running), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
        yield listening.result()
    finally:
        server.stop()
        await asyncio.wait_for(running, 30)


class ScriptedInstance:
    """A mixed instance. Its answer to every request are the tokens of ``text``, one an output, then eos.

    Attributes:
        text: the answer, or a function of the request.
        hold_after: so many tokens come; the others when ``go_on`` is set.
        honours_stops: ends at stop strings, as engines do.
        tokens_an_output: how many tokens each output carries.
        requests: all that came, in order.
    """

    def __init__(
        self,
        scheduler: SchedulerSettings,
        tokenizer_dir: Path,
        *,
        role: Role = Role.MIXED,
        model: str = MODEL,
        names_tokenizer: bool = True,
        room: int = 8,
    ) -> None:
        registration = Registration(
            name=f"scripted-{role.value}",
            role=role,
            model=model,
            must_match={"kv.dtype": "float32"},
            capacity_tokens=100_000,
            capacity_requests=64,
            block_size=16,
            max_model_len=MAX_MODEL_LEN,
            details={"tokenizer": str(tokenizer_dir)} if names_tokenizer else {},
        )
        self.tokenizer = Tokenizer.from_pretrained_dir(tokenizer_dir)
        self.text: str | Callable[[Request], str] = "the quick brown fox"
        self.hold_after: int | None = None
        self.go_on = asyncio.Event()
        self.honours_stops = True
        self.tokens_an_output = 1
        self.fails_with: str | None = None
        self.requests: list[Request] = []
        self.dropped: asyncio.Queue[Dropped] = asyncio.Queue()
        self._session = InstanceSession(scheduler, registration, self._on_event)
        self._room = room
        self._running: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ScriptedInstance:
        await self._session.start()
        self._ticker = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._ticker is not None
        for task in (self._ticker, *self._running.values()):
            task.cancel()
        await self._session.close()

    async def _tick(self) -> None:
        while True:
            self._session.alive()
            self._session.set_room(self._room)
            await asyncio.sleep(0.05)

    def _on_event(self, event: InstanceEvent) -> None:
        if isinstance(event, PrefillAssigned):
            self.requests.append(event.request)
            run = (event.request.request_id, event.epoch)
            self._running[run] = asyncio.create_task(self._answer(event.request, event.epoch))
        elif isinstance(event, Dropped):
            if (task := self._running.pop((event.request_id, event.epoch), None)) is not None:
                task.cancel()
            self.dropped.put_nowait(event)

    async def _answer(self, request: Request, epoch: int) -> None:
        if self.fails_with is not None:
            self._session.give_back(request.request_id, epoch, self.fails_with, retry=False)
            return
        self._session.step(request.request_id, epoch, {"lane": "none"})
        outputs = self._outputs(request, epoch)
        for position, output in enumerate(outputs):
            if position == self.hold_after:
                await self.go_on.wait()
            self._session.publish([output])
            await asyncio.sleep(0)

    def _outputs(self, request: Request, epoch: int) -> list[Output]:
        text = self.text if isinstance(self.text, str) else self.text(request)
        tokens = [*self.tokenizer.encode(text), self.tokenizer.encode("<|im_end|>")[0]]
        decoder, matcher = IncrementalDecoder(self.tokenizer), StopMatcher(request.sampling.stop)
        finish = FinishReason.STOP
        for count, token in enumerate(tokens, start=1):
            matcher.feed(decoder.push(token))
            if matcher.matched is not None and self.honours_stops:
                tokens = tokens[:count]
                break
        if request.sampling.max_tokens < len(tokens):
            tokens, finish = tokens[: request.sampling.max_tokens], FinishReason.LENGTH
        step = self.tokens_an_output
        outputs = [
            Output(
                request.request_id, epoch, i, tuple(tokens[i : i + step]), self._logprobs(request, tokens[i : i + step])
            )
            for i in range(0, len(tokens), step)
        ]
        return [*outputs[:-1], replace(outputs[-1], finish_reason=finish)]

    def _logprobs(self, request: Request, tokens: list[int]) -> tuple[TokenLogprob, ...]:
        if request.sampling.logprobs is None:
            return ()
        num_top = request.sampling.logprobs
        return tuple(TokenLogprob(t, -0.25, ((t, -0.25), (5, float("-inf")))[:num_top]) for t in tokens)
