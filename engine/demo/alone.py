"""The same requests through an engine alone, one at a time, without scheduler and transfer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from engine.demo.workload import DemoRequest
from engine.plugins import load_engine
from engine.port import Mode, TokensOut
from engine.settings import EngineSettings
from splitwise_sched.types import Request, Role, SamplingParams


def run_alone(settings: EngineSettings, requests: Sequence[DemoRequest]) -> Iterator[tuple[int, ...]]:
    """Greedy output token ids of each request in turn, the end token included where it came.

    Raises:
        ConfigError: the engine or its model cannot be loaded.
    """
    with closing(load_engine(settings.engine).create(settings, Role.MIXED)) as engine:
        for request in requests:
            sampling = SamplingParams(max_tokens=request.max_tokens, temperature=0.0)
            engine.submit(
                request.request_id,
                Request(request.request_id, engine.spec.model, request.prompt_token_ids, sampling),
                Mode.FULL,
            )
            tokens: list[int] = []
            while engine.has_work():
                for event in engine.step():
                    assert isinstance(event, TokensOut)
                    tokens += event.token_ids
            yield tuple(tokens)
