"""The suite: subclass ``EngineConformance`` in a test module, with ``plugin`` set, and pytest does the rest."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest

from engine.conformance.driving import Result, run, run_disaggregated, step
from engine.errors import KVRejected
from engine.plugins import EnginePlugin
from engine.port import EngineDriver, Mode, TokensOut
from engine.settings import EngineSettings
from kv_transfer.layout import check_compatible
from kv_transfer.memory import KVPool
from splitwise_sched.errors import ConfigError, InvalidRequest
from splitwise_sched.types import FinishReason, Request, Role, SamplingParams

NUM_OUTPUT = 12
BLOCK_SIZE = 16
NUM_BLOCKS = 64
# Around a block, and around the tokens of a step (32).
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 70, 200)
MakeEngine = Callable[..., EngineDriver]

_models: dict[type[EnginePlugin], str] = {}


def prompt_of(num_tokens: int) -> tuple[int, ...]:
    rng = random.Random(num_tokens)
    return tuple(rng.randrange(3, 500) for _ in range(num_tokens))


def greedy(num_tokens: int, max_tokens: int = NUM_OUTPUT, request_id: str | None = None) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(request_id or f"r{num_tokens}", "tiny", prompt_of(num_tokens), sampling)


def sampled(num_tokens: int, seed: int) -> Request:
    request = greedy(num_tokens)
    return dataclasses.replace(
        request, sampling=dataclasses.replace(request.sampling, temperature=0.9, top_p=0.95, top_k=40, seed=seed)
    )


def continued(request: Request, emitted: Sequence[int]) -> Request:
    return dataclasses.replace(request, emitted_token_ids=tuple(emitted))


def tokens_of(results: dict[str, Result]) -> dict[str, list[int]]:
    return {key: result.tokens for key, result in results.items()}


GREEDY = [greedy(length) for length in LENGTHS]


class EngineConformance:
    """
    Attributes:
        plugin: the engine to be tested.
        extra_settings: fields of EngineSettings without which it does not work.
    """

    plugin: ClassVar[EnginePlugin]
    extra_settings: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        """Made once, for all tests of a plugin."""
        kind = type(self.plugin)
        if kind not in _models:
            try:
                _models[kind] = self.plugin.tiny_model(tmp_path_factory.mktemp("model"))
            except ConfigError as exc:
                if os.environ.get("CI") == "true":
                    pytest.fail(str(exc))
                pytest.skip(str(exc))
        return _models[kind]

    @pytest.fixture
    def make(self, model: str) -> Iterator[MakeEngine]:
        """Makes engines, which are closed at the end, when every block must be free again."""
        made: list[EngineDriver] = []

        def make_engine(role: Role = Role.MIXED, **settings: Any) -> EngineDriver:
            fields: dict[str, Any] = {
                "model": model,
                "served_model_name": "tiny",
                "dtype": "float32",
                "block_size": BLOCK_SIZE,
                "num_gpu_blocks_override": NUM_BLOCKS,
                "max_num_batched_tokens": 32,
                "max_num_seqs": 12,
                "num_threads": 1,
                **self.extra_settings,
                **settings,
            }
            made.append(self.plugin.create(EngineSettings(**fields), role))
            return made[-1]

        yield make_engine
        for engine in made:
            assert engine.load().num_free_blocks == engine.spec.num_blocks, "every block comes back"
            engine.close()
            engine.close()

    @pytest.fixture
    def engine(self, make: MakeEngine) -> EngineDriver:
        return make()

    @pytest.fixture
    def pair(self, make: MakeEngine) -> tuple[EngineDriver, EngineDriver]:
        """A prefill and a decode engine whose pools and block ids differ."""
        decode = make(Role.DECODE, num_gpu_blocks_override=90, max_num_batched_tokens=64)
        decode.reserve("shifts-block-ids", greedy(20))
        return make(Role.PREFILL), decode

    def test_constants_agree_with_each_other(self, engine: EngineDriver) -> None:
        spec, layout = engine.spec, engine.kv_layout
        assert spec.model == "tiny"
        assert spec.block_size == layout.block_size
        assert 0 < spec.max_model_len <= spec.num_blocks * spec.block_size
        assert [pool.layout.tp_rank for pool in engine.kv_pools] == list(range(layout.tp_size))
        assert engine.load().num_free_blocks == spec.num_blocks

    def test_requests_that_run_together_get_what_each_gets_alone(self, engine: EngineDriver) -> None:
        alone = {r.request_id: run(engine, [r])[r.request_id] for r in GREEDY}
        assert run(engine, GREEDY) == alone
        assert all(len(result.tokens) == NUM_OUTPUT for result in alone.values())
        assert all(result.finish_reason is FinishReason.LENGTH for result in alone.values())
        assert len({tuple(result.tokens) for result in alone.values()}) == len(GREEDY), "too uniform to tell anything"

    def test_tokens_are_the_same_when_prefill_and_decode_are_apart(
        self, engine: EngineDriver, pair: tuple[EngineDriver, EngineDriver]
    ) -> None:
        prefill, decode = pair
        check_compatible(prefill.kv_layout, decode.kv_layout)
        results, different = run_disaggregated(prefill, decode, GREEDY)
        assert tokens_of(results) == tokens_of(run(engine, GREEDY))
        assert different == {request.request_id: [] for request in GREEDY}, "KV changed on the way"
        decode.abort("shifts-block-ids")

    @pytest.mark.parametrize("at", ["first", "last"])
    def test_damaged_kv_is_refused_or_changes_the_answer(
        self, engine: EngineDriver, pair: tuple[EngineDriver, EngineDriver], at: str
    ) -> None:
        prefill, decode = pair
        request = greedy(48)

        def damage(pool: KVPool, block_ids: Sequence[int]) -> None:
            pool.as_array()[block_ids[0 if at == "first" else -1]] = 0

        try:
            results, _ = run_disaggregated(prefill, decode, [request], damage=damage)
            assert tokens_of(results) != tokens_of(run(engine, [request]))
        except KVRejected:
            decode.abort(request.request_id)
            assert tokens_of(run(decode, [request])) == tokens_of(run(engine, [request]))
        decode.abort("shifts-block-ids")

    def test_sampled_request_goes_on_where_another_run_of_it_stood(
        self, engine: EngineDriver, pair: tuple[EngineDriver, EngineDriver]
    ) -> None:
        requests = [sampled(length, seed=length) for length in (3, 16, 40)]
        whole = tokens_of(run(engine, requests))
        assert tokens_of(run(engine, requests)) == whole
        rest = [continued(r, whole[r.request_id][:5]) for r in requests]
        assert tokens_of(run(engine, rest)) == {key: tokens[5:] for key, tokens in whole.items()}
        prefill, decode = pair
        assert tokens_of(run_disaggregated(prefill, decode, rest)[0]) == {k: t[5:] for k, t in whole.items()}
        decode.abort("shifts-block-ids")

    def test_first_token_that_ends_a_request_ends_it_on_the_prefill_side(self, engine: EngineDriver) -> None:
        engine.submit("a", greedy(20, 1), Mode.PREFILL)
        events = [event for event in step(engine) if isinstance(event, TokensOut)]
        assert [(len(e.token_ids), e.finish_reason) for e in events] == [(1, FinishReason.LENGTH)]
        engine.release("a")

    def test_prefill_run_holds_its_blocks_until_they_are_released(self, engine: EngineDriver) -> None:
        engine.submit("a", greedy(40), Mode.PREFILL)
        while engine.has_work():
            step(engine)
        assert engine.load().num_running == 1
        engine.release("a")
        engine.release("a")
        engine.release("never heard of")
        assert engine.load().num_running == 0

    @pytest.mark.parametrize("when", ["waiting", "half computed", "generating", "held", "reserved"])
    def test_aborted_run_is_forgotten_with_its_blocks(self, engine: EngineDriver, when: str) -> None:
        if when == "reserved":
            assert engine.reserve("a", greedy(50))
        else:
            engine.submit("a", greedy(50), Mode.PREFILL if when == "held" else Mode.FULL)
            for _ in range({"waiting": 0, "half computed": 1, "generating": 3, "held": 2}[when]):
                step(engine)
        engine.abort("a")
        engine.abort("a")
        assert not engine.has_work()
        assert engine.step() == []
        assert (engine.load().num_running, engine.load().num_waiting) == (0, 0)

    def test_reservation_waits_until_there_is_room_and_takes_nothing_meanwhile(self, make: MakeEngine) -> None:
        engine = make(Role.DECODE, num_gpu_blocks_override=8)
        assert len(engine.reserve("a", greedy(90)) or ()) == 6
        before = engine.load()
        assert engine.reserve("b", greedy(60)) is None
        assert engine.load() == before
        engine.abort("a")
        assert len(engine.reserve("b", greedy(60)) or ()) == 4
        engine.abort("b")

    def test_commit_without_reservation_is_an_error(self, engine: EngineDriver) -> None:
        with pytest.raises(ValueError, match="reserved"):
            engine.commit("a", TokensOut("a", 0, (5,)))

    def test_requests_that_do_not_fit_together_all_end_with_their_tokens(
        self, engine: EngineDriver, make: MakeEngine
    ) -> None:
        requests = [greedy(length, 40) for length in (1, 20, 33, 47, 60, 71)]
        tight = make(num_gpu_blocks_override=9)
        assert tokens_of(run(tight, requests)) == tokens_of(run(engine, requests))

    @pytest.mark.parametrize("case", ["too long", "no such token", "nothing left"])
    def test_request_that_can_never_run_is_refused(self, engine: EngineDriver, case: str) -> None:
        request = {
            "too long": greedy(10, engine.spec.max_model_len),
            "no such token": dataclasses.replace(greedy(2), prompt_token_ids=(5, engine.spec.vocab_size)),
            "nothing left": continued(greedy(2, 2), (5, 6)),
        }[case]
        with pytest.raises(InvalidRequest):
            engine.check(request)

    def test_logprobs_come_with_each_token_when_asked_for(self, engine: EngineDriver) -> None:
        request = greedy(20)
        asking = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, logprobs=2))
        result = run(engine, [asking])[request.request_id]
        assert [logprob.token_id for logprob in result.logprobs] == result.tokens
        for logprob in result.logprobs:
            assert len(logprob.top) == 2
            assert logprob.top[0] == (logprob.token_id, logprob.logprob)
            assert 0 >= logprob.logprob >= logprob.top[1][1]
