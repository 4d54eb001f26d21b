"""Running requests through engines by hand: on one, or on two with KV copied between them."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from engine.port import BlocksReady, EngineDriver, EngineEvent, Mode, TokensOut
from kv_transfer.memory import KVPool
from splitwise_sched.types import FinishReason, Request, TokenLogprob


@dataclass
class Result:
    """What a request got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    detail: str | None = None

    def add(self, event: TokensOut, first_index: int) -> None:
        assert self.finish_reason is None, "output after the end"
        assert event.index == first_index + len(self.tokens), "output tokens are numbered without gaps"
        self.tokens += event.token_ids
        self.logprobs += event.logprobs
        self.finish_reason, self.stop_reason, self.detail = event.finish_reason, event.stop_reason, event.detail


def step(engine: EngineDriver) -> list[EngineEvent]:
    """One step, which must not go by without effect while there is work."""
    assert engine.has_work()
    return engine.step()


def run(engine: EngineDriver, requests: Iterable[Request]) -> dict[str, Result]:
    """Run requests to their end, all submitted at once."""
    results: dict[str, Result] = {}
    offsets: dict[str, int] = {}
    for request in requests:
        engine.check(request)
        engine.submit(request.request_id, request, Mode.FULL)
        results[request.request_id] = Result()
        offsets[request.request_id] = len(request.emitted_token_ids)
    while engine.has_work():
        for event in engine.step():
            assert isinstance(event, TokensOut)
            results[event.key].add(event, offsets[event.key])
    return results


def checksums(pool: KVPool, block_ids: Iterable[int]) -> dict[tuple[int, int], int]:
    """By (layer, index in the block table)."""
    return {
        (layer, index): zlib.crc32(pool.block_view(block_id, layer).tobytes())
        for index, block_id in enumerate(block_ids)
        for layer in range(pool.layout.num_layers)
    }


def run_disaggregated(
    prefill: EngineDriver,
    decode: EngineDriver,
    requests: Iterable[Request],
    *,
    damage: Callable[[KVPool, Sequence[int]], None] | None = None,
) -> tuple[dict[str, Result], dict[str, list[tuple[int, int]]]]:
    """Run requests across two engines, copying each block when it is reported.

    Args:
        damage: called with the decode pool and the reserved blocks of each request, before it goes on there.
    Returns:
        Results, and for each request the (layer, block) whose KV differs between the engines when it goes on.
    """
    (source,), (target,) = prefill.kv_pools, decode.kv_pools
    assert isinstance(source, KVPool) and isinstance(target, KVPool), "blocks are copied by the host here"
    results: dict[str, Result] = {}
    different: dict[str, list[tuple[int, int]]] = {}
    tables: dict[str, list[int]] = defaultdict(list)
    reserved: dict[str, tuple[int, ...]] = {}
    offsets: dict[str, int] = {}
    complete: set[str] = set()
    for request in requests:
        key = request.request_id
        results[key], offsets[key] = Result(), len(request.emitted_token_ids)
        prefill.submit(key, request, Mode.PREFILL)
        blocks = decode.reserve(key, request)
        assert blocks is not None
        reserved[key] = blocks
    while prefill.has_work():
        for event in prefill.step():
            key = event.key
            if isinstance(event, BlocksReady):
                assert event.first_index == len(tables[key]) and key not in complete
                for index, block_id in enumerate(event.block_ids, start=event.first_index):
                    target.as_array()[reserved[key][index]] = source.as_array()[block_id]
                tables[key] += event.block_ids
                if event.is_last:
                    complete.add(key)
                continue
            assert key in complete and len(tables[key]) == len(reserved[key])
            results[key].add(event, offsets[key])
            if damage is not None:
                damage(target, reserved[key])
            before, after = checksums(source, tables[key]), checksums(target, reserved[key])
            different[key] = [place for place, value in before.items() if after[place] != value]
            prefill.release(key)
            if event.finish_reason is None:
                decode.commit(key, event)
            else:
                decode.abort(key)
    while decode.has_work():
        for event in decode.step():
            assert isinstance(event, TokensOut)
            results[event.key].add(event, offsets[event.key])
    return results, different
