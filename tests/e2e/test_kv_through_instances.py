"""Two instances in one process, real messengers between them: tokens and KV bytes arrive as they left."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine import runner
from engine.port import BlocksReady, EngineDriver, EngineEvent, TokensOut
from engine.runner import Runner, RunnerOptions
from engine.testing import make_tiny_model
from engine.transformers import TransformersOptions, create
from kv_transfer.checksums import LayerSums, Mismatch, Sums
from kv_transfer.options import TransferOptions
from kv_transfer.plan import IntArray
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Role
from tests.e2e.reference import generate
from tests.engine_drivers import greedy, random_prompt

REQUESTS = [greedy(random_prompt(length), 24) for length in (1, 15, 16, 17, 64, 65, 130, 300, 400)]
Checksums = dict[tuple[int, int], int]


class Watched:
    """A runner whose engine's KV is looked at: when its blocks are reported, and when it goes on with what came."""

    def __init__(self, role: Role, path: Path, settings: SchedulerSettings, transport: str, **other: Any) -> None:
        options = TransformersOptions(
            model=str(path), served_model_name="tiny", role=role, num_blocks=150, max_num_batched_tokens=64,
            num_threads=1, block_size=other.pop("block_size", 16),
        )  # fmt: skip
        self.engine: EngineDriver = create(options)
        self.reported: dict[str, Checksums] = {}
        self.reports: dict[str, int] = {}
        self.committed: dict[str, Checksums] = {}
        self.damage: tuple[str, int, int] | None = None
        self._tables: dict[str, tuple[int, ...]] = {}
        self._step, self._commit, self._reserve = self.engine.step, self.engine.commit, self.engine.reserve
        self.engine.step, self.engine.commit = self._watched_step, self._watched_commit  # type: ignore[method-assign]
        self.engine.reserve = self._watched_reserve  # type: ignore[method-assign]
        runner_options = RunnerOptions(role.value, role, other.pop("max_waiting_tokens", 2048))
        self.runner = Runner(self.engine, settings, TransferOptions(protocols=(transport,), **other), runner_options)
        self.thread = threading.Thread(target=self.runner.run)

    def checksums(self, block_ids: tuple[int, ...], first_index: int = 0) -> Checksums:
        (pool,) = self.engine.kv_pools
        return {
            (layer, first_index + i): zlib.crc32(pool.block_view(block_id, layer).tobytes())
            for i, block_id in enumerate(block_ids)
            for layer in range(pool.layout.num_layers)
        }

    def _watched_step(self) -> list[EngineEvent]:
        events = self._step()
        for event in events:
            if isinstance(event, BlocksReady):
                self.reports[event.key] = self.reports.get(event.key, 0) + 1
                sums = self.checksums(event.block_ids, event.first_index)
                self.reported.setdefault(event.key, {}).update(sums)
        return events

    def _watched_reserve(self, key, request):
        block_ids = self._reserve(key, request)
        if block_ids is not None:
            self._tables[key] = block_ids
        return block_ids

    def _watched_commit(self, key: str, first: TokensOut) -> None:
        if self.damage is not None and self.damage[0] == key:
            _, layer, index = self.damage
            self.engine.kv_pools[0].block_view(self._tables[key][index], layer)[:] = 0
        self.committed[key] = self.checksums(self._tables[key])
        self._commit(key, first)

    def start(self) -> None:
        self.runner.start()
        self.thread.start()

    def close(self) -> None:
        self.runner.stop()
        if self.thread.is_alive():
            self.thread.join(10)
        self.runner.close()
        self.engine.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    tokens = generate(model, REQUESTS)
    assert len({t for output in tokens.values() for t in output}) > 100, "too uniform to tell anything"
    return tokens


@pytest.fixture
def settings(redis_server, topic: str) -> SchedulerSettings:
    return SchedulerSettings(scheduler_host=redis_server.host, scheduler_port=redis_server.port, scheduler_topic=topic)


@contextlib.contextmanager
def serving(instances: Sequence[Watched]) -> Iterator[None]:
    try:
        for one in instances:
            one.start()
        yield
    finally:
        for one in instances:
            one.close()


@pytest.fixture(params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest, model: Path, settings: SchedulerSettings) -> Iterator[tuple[Watched, Watched]]:
    both = [Watched(role, model, settings, request.param) for role in (Role.PREFILL, Role.DECODE)]
    with serving(both):
        yield both[0], both[1]


async def answers_of(settings: SchedulerSettings) -> tuple[dict[str, list[int]], dict[str, dict[str, str]]]:
    async with FrontEnd(settings) as frontend:

        async def answer(request) -> list[int]:
            return [t async for output in await frontend.submit(request) for t in output.token_ids]

        answers = await asyncio.wait_for(asyncio.gather(*map(answer, REQUESTS)), 60)
        records = {r.request_id: dict(await frontend.request_record(r.request_id)) for r in REQUESTS}
    return {r.request_id: a for r, a in zip(REQUESTS, answers, strict=True)}, records


async def test_tokens_equal_generate_and_kv_bytes_arrive_by_layer_and_block(pair, expected):
    prefill, decode = pair
    answers, records = await answers_of(prefill.runner._settings)
    assert answers == expected
    assert prefill.reported == decode.committed
    assert prefill.reports["r400@1"] > 3, "blocks were reported only at the end of prefill"
    lane = prefill.runner.ranks._messengers[0]._options.protocols[0]
    assert {r["lane"] for r in records.values()} == {lane}
    block_bytes = decode.engine.kv_layout.block_bytes
    assert records["r400"]["kv_bytes"] == str(400 // 16 * block_bytes)
    assert [one.engine.load().num_free_blocks for one in pair] == [150, 150]


@pytest.mark.parametrize("case", [("shm", 16, 24), ("tcp", 24, 16)])
async def test_instances_whose_blocks_differ_in_size_exchange_kv(model, expected, settings, case):
    transport, *sizes = case
    roles = zip((Role.PREFILL, Role.DECODE), sizes, strict=True)
    both = [Watched(role, model, settings, transport, block_size=block_size) for role, block_size in roles]
    with serving(both):
        answers, records = await answers_of(settings)
    assert answers == expected
    assert {r["lane"] for r in records.values()} == {transport}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_request_whose_kv_is_damaged_on_its_way_is_run_again(model, expected, settings, transport):
    both = [Watched(role, model, settings, transport, checksum="crc32") for role in (Role.PREFILL, Role.DECODE)]
    compare, damaged = LayerSums.compare, []

    def compare_damaged(self: LayerSums, src_ids: IntArray, dst_ids: IntArray, wanted: Sums) -> Mismatch | None:
        if not damaged:
            damaged.append(int(dst_ids[-1]))
            both[1].engine.kv_pools[0].block_view(damaged[0], 1)[:] = 0
        return compare(self, src_ids, dst_ids, wanted)

    with pytest.MonkeyPatch.context() as patch, serving(both):
        patch.setattr(LayerSums, "compare", compare_damaged)
        answers, records = await answers_of(settings)
    assert answers == expected
    assert sorted(record["epoch"] for record in records.values()) == ["1"] * (len(records) - 1) + ["2"]
    assert both[1].runner.ranks.counters()["checksum_mismatch_total"] == 1
    assert [one.engine.load().num_free_blocks for one in both] == [150, 150]


async def test_one_block_zeroed_in_one_layer_on_its_way_is_seen_in_tokens_and_checksums(pair, expected):
    prefill, decode = pair
    decode.damage = ("r64@1", 1, 2)
    answers, _ = await answers_of(prefill.runner._settings)
    different = {key for key in answers if answers[key] != expected[key]}
    assert different == {"r64"}
    sent, arrived = prefill.reported["r64@1"], decode.committed["r64@1"]
    assert [place for place in sent if sent[place] != arrived[place]] == [(1, 2)]


async def test_an_instance_is_told_of_all_that_comes_and_need_not_ask(pair, expected, monkeypatch):
    monkeypatch.setattr(runner, "LOOK_S", 3600)
    answers, _ = await answers_of(pair[0].runner._settings)
    assert answers == expected


async def test_room_that_a_computed_prompt_leaves_is_told(model, redis_server, topic, monkeypatch):
    settings = SchedulerSettings(
        scheduler_host=redis_server.host, scheduler_port=redis_server.port, scheduler_topic=topic
    )
    monkeypatch.setattr(runner, "LOOK_S", 3600)
    # Nothing more is claimed while a prompt is still to be computed, which takes this one several steps.
    mixed = Watched(Role.MIXED, model, settings, "tcp", max_waiting_tokens=1)
    try:
        mixed.start()
        assert mixed.runner.instance is not None
        async with FrontEnd(settings) as frontend:
            async for _ in await frontend.submit(REQUESTS[-1]):
                pass
        assert mixed.runner.instance._room_said == runner.CLAIM_AT_ONCE
    finally:
        mixed.close()
