"""llama.cpp instances under the scheduler: killed, lied to, and every user still gets the tokens of llama.cpp alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from engine.demo.fleet import Fleet
from engine.llama_cpp.plugin import LlamaCppPlugin
from engine.llama_cpp.testing import make_tiny_gguf
from engine.port import TokensOut
from engine.runner import Runner, RunnerOptions
from engine.settings import EngineSettings
from engine.testing import make_tiny_model
from kv_transfer.options import TransferOptions
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Request, Role, SamplingParams
from tests.e2e.killing import kill_one_under_load, start_two_pairs
from tests.engine_drivers import random_prompt, run
from tests.integration.toy import tokens_of

NUM_OUTPUT = 150
FIELDS = {
    "dtype": "float32",
    "served_model_name": "tiny",
    "num_gpu_blocks_override": 450,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "num_threads": 1,
}
FLAGS = ("--engine", "llama_cpp", "--dtype", "float32", "--served-model-name", "tiny", "--num-gpu-blocks-override",
         "450", "--max-num-batched-tokens", "64", "--max-num-seqs", "16")  # fmt: skip
LENGTHS = (1, 5, 17, 40, 64, 100, 200, 333, 600, 900)


def request_of(index: int, length: int) -> Request:
    """Every other one is sampled: where it is cut off, its draws go on as well."""
    temperature = 0.8 * (index % 2)
    sampling = SamplingParams(max_tokens=NUM_OUTPUT, temperature=temperature, top_k=40, seed=index, ignore_eos=True)
    return Request(f"r{index}", "tiny", random_prompt(length), sampling)


REQUESTS = [request_of(index, length) for index, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(make_tiny_model("llama", tmp_path_factory.mktemp("llama")))


def engine_on(model: Path, role: Role):
    return LlamaCppPlugin().create(EngineSettings(engine="llama_cpp", model=str(model), **FIELDS), role)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    engine = engine_on(model, Role.MIXED)
    try:
        return {key: result.tokens for key, result in run(engine, REQUESTS).items()}
    finally:
        engine.close()


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_killed_instance_costs_no_request_and_no_token(model, expected, victim):
    with Fleet() as fleet:
        await start_two_pairs(fleet, model, FLAGS)
        await kill_one_under_load(fleet, REQUESTS, victim, expected)


class Serving:
    """An instance in this process."""

    def __init__(self, model: Path, role: Role, settings: SchedulerSettings, transport: str) -> None:
        self.engine = engine_on(model, role)
        transfer = TransferOptions(protocols=(transport,))
        self.runner = Runner(self.engine, settings, transfer, RunnerOptions(name=role.value, role=role))
        self.runner.start()
        self._thread = threading.Thread(target=self.runner.run)
        self._thread.start()

    def close(self) -> None:
        self.runner.stop()
        self._thread.join(20)
        self.runner.close()
        self.engine.close()


@pytest.fixture(params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest, model: Path, redis_server, topic: str) -> Iterator[tuple[Serving, Serving]]:
    settings = SchedulerSettings(
        scheduler_host=redis_server.host, scheduler_port=redis_server.port, scheduler_topic=topic
    )
    both: list[Serving] = []
    try:
        for role in (Role.PREFILL, Role.DECODE):
            both.append(Serving(model, role, settings, request.param))
        yield both[0], both[1]
    finally:
        for one in both:
            one.close()


async def test_kv_that_was_damaged_on_its_way_is_refused_and_computed_again(pair, expected):
    prefill, decode = pair
    commit, damaged = decode.engine.commit, []

    def commit_damaged(key: str, first_token: TokensOut) -> None:
        """Each request's first KV is damaged, in the pool, after the transfer said that all is here."""
        if key.endswith("@1"):
            damaged.append(key)
            block_ids = decode.engine._places[key].block_ids
            decode.engine.kv_pools[0].as_array()[block_ids[-1], 2000:4000] = 0
        commit(key, first_token)

    decode.engine.commit = commit_damaged
    requests = [r for r in REQUESTS if len(r.prompt_token_ids) in (64, 200)]
    async with FrontEnd(prefill.runner._settings) as frontend:
        streams = [await frontend.submit(r) for r in requests]
        got = [await tokens_of(s, 60) for s in streams]
        records = [await frontend.request_record(r.request_id) for r in requests]
    assert [expected[r.request_id] for r in requests] == got
    assert sorted(damaged) == sorted(f"{r.request_id}@1" for r in requests)
    assert {r["attempts"] for r in records} == {"2"}
    assert all("is refused" in r["history"] for r in records)
    assert [one.engine.load().num_free_blocks for one in pair] == [450, 450]
