"""What a request may ask of the transformers engine, and what it tells while it runs."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from engine.port import BlocksReady, EngineDriver, Mode, TokensOut  # noqa: E402
from engine.testing import make_tiny_model  # noqa: E402
from engine.transformers import TransformersOptions, create  # noqa: E402
from splitwise_sched.errors import InvalidRequest  # noqa: E402
from splitwise_sched.tokenizer import Tokenizer  # noqa: E402
from splitwise_sched.types import FinishReason, Request, SamplingParams  # noqa: E402
from tests.engine_drivers import greedy, random_prompt, run, run_disaggregated, step  # noqa: E402

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def engine_on(path: Path, **options: Any) -> EngineDriver:
    settings = {"num_blocks": 64, "max_num_batched_tokens": 32, "max_num_seqs": 8, "num_threads": 1, **options}
    return create(TransformersOptions(model=str(path), served_model_name="tiny", **settings))


@pytest.fixture
def engine(model_dir: Path) -> Iterator[EngineDriver]:
    engine = engine_on(model_dir)
    yield engine
    assert engine.load().num_free_blocks == engine.spec.num_blocks, "every block came back"
    engine.close()


@pytest.fixture
def other(model_dir: Path) -> Iterator[EngineDriver]:
    engine = engine_on(model_dir, num_blocks=50)
    yield engine
    assert engine.load().num_free_blocks == engine.spec.num_blocks, "every block came back"
    engine.close()


def with_sampling(request: Request, **changes: Any) -> Request:
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **changes))


def continued(request: Request, emitted: list[int]) -> Request:
    return dataclasses.replace(request, emitted_token_ids=tuple(emitted))


SAMPLED = [
    Request(
        f"s{i}",
        "tiny",
        random_prompt(length),
        SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, top_k=50, seed=i, ignore_eos=True),
    )
    for i, length in enumerate((3, 16, 40, 70))
]


def test_sampled_output_is_the_same_again_and_differs_by_seed(engine: EngineDriver) -> None:
    first, again = run(engine, SAMPLED), run(engine, SAMPLED)
    assert first == again
    other_seed = run(engine, [with_sampling(request, seed=1000) for request in SAMPLED])
    assert all(first[key].tokens != other_seed[key].tokens for key in first)


@pytest.mark.parametrize("num_emitted", [1, 7, 19])
def test_request_that_was_cut_off_goes_on_with_the_same_tokens(engine: EngineDriver, num_emitted: int) -> None:
    whole = run(engine, SAMPLED)
    rest = run(engine, [continued(r, whole[r.request_id].tokens[:num_emitted]) for r in SAMPLED])
    for key, result in whole.items():
        assert rest[key].tokens == result.tokens[num_emitted:]
        assert rest[key].finish_reason is FinishReason.LENGTH


def test_sampled_output_is_the_same_when_disaggregated(engine: EngineDriver, other: EngineDriver) -> None:
    whole = run(engine, SAMPLED)
    assert run_disaggregated(engine, other, SAMPLED)[0] == whole
    rest = [continued(r, whole[r.request_id].tokens[:5]) for r in SAMPLED]
    for key, result in run_disaggregated(engine, other, rest)[0].items():
        assert result.tokens == whole[key].tokens[5:]


def test_output_ends_with_any_of_the_model_s_end_tokens_unless_told_otherwise(
    engine: EngineDriver, model_dir: Path, tmp_path: Path
) -> None:
    request = greedy(random_prompt(20), 20)
    tokens = run(engine, [request])["r20"].tokens
    end = next(token_id for token_id in tokens[4:] if token_id not in tokens[:4])
    path = shutil.copytree(model_dir, tmp_path / "ends")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    ending = engine_on(path)
    try:
        result = run(ending, [with_sampling(request, ignore_eos=False)])["r20"]
        assert result.tokens == tokens[: tokens.index(end) + 1]
        assert (result.finish_reason, result.stop_reason) == (FinishReason.STOP, None)
        assert run(ending, [request])["r20"].tokens == tokens
    finally:
        ending.close()


def test_stop_token_ends_the_output_and_is_named(engine: EngineDriver) -> None:
    request = greedy(random_prompt(20), 20)
    tokens = run(engine, [request])["r20"].tokens
    stop = next(token_id for token_id in tokens[4:] if token_id not in tokens[:4])
    result = run(engine, [with_sampling(request, stop_token_ids=(stop, 3))])["r20"]
    assert result.tokens == tokens[: tokens.index(stop) + 1]
    assert (result.finish_reason, result.stop_reason) == (FinishReason.STOP, stop)


def test_stop_string_across_tokens_ends_the_output_wherever_it_runs(
    engine: EngineDriver, other: EngineDriver, model_dir: Path
) -> None:
    request = greedy(random_prompt(20), 24)
    tokens = run(engine, [request])["r20"].tokens
    tokenizer = Tokenizer.from_pretrained_dir(model_dir)
    # Half of one token's text and half of the next one's.
    texts = [tokenizer.decode([token_id]) for token_id in tokens]
    at = next(
        i for i in range(6, 22) if len(texts[i]) > 1 and len(texts[i + 1]) > 1 and (texts[i] + texts[i + 1]).isascii()
    )
    stop = texts[at][1:] + texts[at + 1][:1]
    stopping = with_sampling(request, stop=("never in there", stop))
    expected = tokens[: at + 2]
    assert stop not in tokenizer.decode(expected[:-1]), "the string is new with its last token"

    whole = run(engine, [stopping])["r20"]
    assert whole.tokens == expected
    assert (whole.finish_reason, whole.stop_reason) == (FinishReason.STOP, stop)
    assert run_disaggregated(engine, other, [stopping])[0]["r20"] == whole
    # Cut off between the two tokens: the emitted text counts.
    rest = continued(stopping, expected[:-1])
    assert run(engine, [rest])["r20"].tokens == expected[-1:]
    assert run_disaggregated(engine, other, [rest])[0]["r20"].stop_reason == stop


def test_first_token_that_ends_the_request_ends_it_on_the_prefill_instance(
    engine: EngineDriver, other: EngineDriver
) -> None:
    results, _ = run_disaggregated(engine, other, [greedy(random_prompt(20), 1)])
    assert len(results["r20"].tokens) == 1
    assert results["r20"].finish_reason is FinishReason.LENGTH


def test_logprobs_are_those_of_the_whole_sequence_computed_at_once(engine: EngineDriver, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    request = with_sampling(greedy(random_prompt(40), 12), logprobs=3)
    result = run(engine, [request])["r40"]
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor([[*request.prompt_token_ids, *result.tokens]])
    with torch.inference_mode():
        expected = model(ids).logits[0, 39:-1].log_softmax(-1)
    assert len(result.logprobs) == 12
    for row, token_id, logprob in zip(expected, result.tokens, result.logprobs, strict=True):
        assert logprob.token_id == token_id == logprob.top[0][0]
        assert logprob.logprob == pytest.approx(row[token_id].item(), abs=1e-3)
        assert [value for _, value in logprob.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_requests_that_do_not_fit_together_are_preempted_and_lose_nothing(model_dir: Path) -> None:
    requests = [greedy(random_prompt(length), 60, f"p{length}") for length in (1, 20, 33, 47, 60, 71)]
    requests += [dataclasses.replace(r, request_id=f"q{i}") for i, r in enumerate(SAMPLED)]
    roomy, tight = engine_on(model_dir, num_blocks=100), engine_on(model_dir, num_blocks=12)
    try:
        expected, results = run(roomy, requests), run(tight, requests)
        assert results == expected
        assert tight.load().num_preempted_total > 0 == roomy.load().num_preempted_total
        assert tight.load().num_free_blocks == 12
    finally:
        roomy.close()
        tight.close()


def test_reserved_blocks_are_never_preempted(model_dir: Path, engine: EngineDriver) -> None:
    running, incoming = greedy(random_prompt(40), 60, "running"), greedy(random_prompt(60), 20, "incoming")
    expected = run(engine, [running])["running"].tokens
    tight = engine_on(model_dir, num_blocks=8)
    pool = tight.kv_pools[0].as_array()
    tokens: list[int] = []

    def run_until_it_rests() -> None:
        while tight.has_work():
            for event in tight.step():
                assert isinstance(event, TokensOut)
                tokens.extend(event.token_ids)

    try:
        tight.submit("running", running, Mode.FULL)
        tokens += [
            t for _ in range(2) for event in step(tight) if isinstance(event, TokensOut) for t in event.token_ids
        ]
        blocks = list(tight.reserve("incoming", incoming) or ())
        assert len(blocks) == 4
        pool[blocks] = 77
        run_until_it_rests()
        # Its next block is missing, and nobody may give way: it waits for the other's transfer.
        assert 1 < len(tokens) < 60
        assert (pool[blocks] == 77).all()
        tight.abort("incoming")
        run_until_it_rests()
        assert tokens == expected
        assert tight.load().num_preempted_total == 0
    finally:
        tight.close()


def test_prefill_run_is_never_preempted_because_a_transfer_may_be_reading_its_blocks(
    model_dir: Path, engine: EngineDriver
) -> None:
    older, newer = greedy(random_prompt(30), 60, "older"), greedy(random_prompt(90), request_id="newer")
    expected = run(engine, [older])["older"].tokens
    # The newer one computes 3 tokens a step while the older one generates, and needs 30 steps.
    tight = engine_on(model_dir, num_blocks=9, max_num_seqs=2, max_num_batched_tokens=4)
    tokens: list[int] = []
    reported: list[int] = []

    def run_until_it_rests() -> None:
        while tight.has_work():
            for event in tight.step():
                if isinstance(event, BlocksReady):
                    reported.extend(event.block_ids)
                elif event.key == "older":
                    tokens.extend(event.token_ids)

    try:
        tight.submit("older", older, Mode.FULL)
        for _ in range(7):
            assert step(tight) == []
        tight.submit("newer", newer, Mode.PREFILL)
        run_until_it_rests()
        # Only the newer one could give the older one its next block; it is done, without having moved.
        assert len(set(reported)) == len(reported) == 6
        assert len(tokens) == 3 * BLOCK_SIZE - len(older.prompt_token_ids) + 1
        assert tight.load().num_preempted_total == 0
        tight.release("newer")
        run_until_it_rests()
        assert tokens == expected
    finally:
        tight.close()


def test_decode_request_that_was_preempted_is_computed_again_from_its_tokens(
    model_dir: Path, engine: EngineDriver
) -> None:
    requests = [greedy(random_prompt(length), 60, f"d{length}") for length in (17, 31, 45)]
    expected = run(engine, requests)
    tight = engine_on(model_dir, num_blocks=12)
    try:
        results, _ = run_disaggregated(engine, tight, requests)
        assert results == expected
        assert tight.load().num_preempted_total > 0
    finally:
        tight.close()


def test_preempted_request_gets_its_blocks_back_before_newcomers_get_any(model_dir: Path, engine: EngineDriver) -> None:
    requests = [greedy(random_prompt(length), 60, f"d{length}") for length in (30, 31)]
    expected = run(engine, requests)
    tight = engine_on(model_dir, num_blocks=6)
    tokens: dict[str, list[int]] = {"d30": [], "d31": []}

    def advance() -> None:
        for event in step(tight):
            assert isinstance(event, TokensOut)
            tokens[event.key] += event.token_ids

    try:
        for request in requests:
            tight.submit(request.request_id, request, Mode.FULL)
        while not tight.load().num_preempted_total:
            advance()
        # There is one for the newcomer, and one of growth for the sequence that runs.
        assert tight.load().num_free_blocks == 2
        while tight.load().num_running:
            assert tight.reserve("newcomer", greedy(random_prompt(1))) is None
            advance()
        assert tight.load().num_waiting == 1
        assert tight.reserve("newcomer", greedy(random_prompt(1))) is not None
        tight.abort("newcomer")
        while tight.has_work():
            advance()
        assert tokens == {key: result.tokens for key, result in expected.items()}
    finally:
        tight.close()


def test_prefill_reports_each_block_once_as_its_chunk_finishes(engine: EngineDriver) -> None:
    engine.submit("a", greedy(random_prompt(70)), Mode.PREFILL)
    reported = []
    for expected_end, is_last in ((2, False), (4, False), (5, True)):
        events = step(engine)
        (ready,) = [event for event in events if isinstance(event, BlocksReady)]
        assert ready.first_index == len(reported)
        reported += ready.block_ids
        assert (len(reported), ready.is_last) == (expected_end, is_last)
    assert isinstance(events[0], BlocksReady) and isinstance(events[1], TokensOut)
    assert events[1].finish_reason is None
    assert not engine.has_work()
    assert engine.load().num_free_blocks == engine.spec.num_blocks - 5
    engine.release("a")
    engine.release("a")
    assert engine.load().num_free_blocks == engine.spec.num_blocks


def test_reserve_takes_all_blocks_or_none(engine: EngineDriver) -> None:
    assert engine.reserve("a", greedy(random_prompt(32 * BLOCK_SIZE - 1))) is not None
    free = engine.load().num_free_blocks
    assert engine.reserve("b", greedy(random_prompt(33 * BLOCK_SIZE))) is None
    assert engine.load().num_free_blocks == free
    assert not engine.has_work()
    # The room for one more token counts: this many tokens alone would fit.
    assert engine.reserve("b", greedy(random_prompt(32 * BLOCK_SIZE))) is None
    engine.abort("a")
    engine.abort("a")


@pytest.mark.parametrize("when", ["waiting", "half computed", "generating", "held", "reserved", "committed"])
def test_aborted_request_frees_its_blocks_and_is_never_heard_of_again(engine: EngineDriver, when: str) -> None:
    request = greedy(random_prompt(50))
    if when in ("reserved", "committed"):
        assert engine.reserve("a", request)
        if when == "committed":
            engine.commit("a", TokensOut("a", 0, (5,)))
    else:
        engine.submit("a", request, Mode.PREFILL if when == "held" else Mode.FULL)
        for _ in range({"waiting": 0, "half computed": 1, "generating": 3, "held": 2}[when]):
            step(engine)
    engine.abort("a")
    assert not engine.has_work()
    assert engine.step() == []
    assert engine.load().num_running == engine.load().num_waiting == 0


def test_commit_of_what_was_not_reserved_or_does_not_fit_is_refused(engine: EngineDriver) -> None:
    with pytest.raises(ValueError, match="no reserved blocks"):
        engine.commit("a", TokensOut("a", 0, (5,)))
    engine.reserve("a", greedy(random_prompt(5)))
    with pytest.raises(ValueError, match="goes on at output 0"):
        engine.commit("a", TokensOut("a", 1, (5,)))
    with pytest.raises(ValueError, match="already here"):
        engine.submit("a", greedy(random_prompt(5)), Mode.FULL)
    engine.abort("a")


def test_committed_token_that_ends_the_request_here_is_told_with_the_next_step(engine: EngineDriver) -> None:
    engine.reserve("a", greedy(random_prompt(5), max_tokens=1))
    engine.commit("a", TokensOut("a", 0, (5,)))
    assert step(engine) == [TokensOut("a", 1, (), (), FinishReason.LENGTH)]
    assert not engine.has_work()


def test_request_whose_logits_are_not_finite_fails_alone(engine: EngineDriver) -> None:
    good = greedy(random_prompt(30), request_id="good")
    expected = run(engine, [good])["good"]
    blocks = engine.reserve("bad", greedy(random_prompt(30)))
    assert blocks is not None
    pool = engine.kv_pools[0]
    for block_id in blocks:
        pool.as_array()[block_id].view("float32")[:] = float("nan")
    engine.commit("bad", TokensOut("bad", 0, (5,)))
    engine.submit("good", good, Mode.FULL)
    events = step(engine)
    (bad,) = [event for event in events if event.key == "bad"]
    assert isinstance(bad, TokensOut)
    assert bad.finish_reason is FinishReason.ERROR and "finite" in str(bad.detail)
    tokens = [token_id for event in events if event.key == "good" for token_id in event.token_ids]
    while engine.has_work():
        tokens += [token_id for event in engine.step() for token_id in event.token_ids]
    assert tokens == expected.tokens
    assert all(
        (pool.as_array()[block_id].view("float32") == pool.as_array()[block_id].view("float32")).all()
        for block_id in blocks
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (greedy(random_prompt(1000), 25), "together 1025, and this engine holds 1024"),
        (greedy((5, 1024, 6)), "token id 1024"),
        (greedy((5, -1)), "token id -1"),
        (continued(greedy((5,), 3), [5, 6, 7]), "nothing is left"),
    ],
    ids=["too long", "no such token", "negative token", "all emitted"],
)
def test_request_that_can_never_run_is_refused_with_the_value(
    engine: EngineDriver, request_: Request, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        engine.check(request_)


def test_longest_request_that_is_accepted_runs_to_its_end(engine: EngineDriver) -> None:
    request = greedy(random_prompt(1000), 24)
    assert len(run(engine, [request])["r1000"].tokens) == 24


def test_load_tells_what_is_held(engine: EngineDriver) -> None:
    engine.submit("a", greedy(random_prompt(40)), Mode.FULL)
    engine.submit("b", greedy(random_prompt(40)), Mode.FULL)
    assert (engine.load().num_running, engine.load().num_waiting) == (0, 2)
    step(engine)
    assert (engine.load().num_running, engine.load().num_waiting) == (1, 1)
    assert engine.load().num_free_blocks == engine.spec.num_blocks - 3
    engine.abort("a")
    engine.abort("b")


def test_closing_frees_blocks_weights_and_pool(model_dir: Path) -> None:
    def num_mapped_pools() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:kv-pool")

    gc.collect()
    before = num_mapped_pools()
    engine = engine_on(model_dir)
    engine.submit("a", greedy(random_prompt(50)), Mode.FULL)
    step(engine)
    assert num_mapped_pools() == before + 1
    engine.close()
    engine.close()
    assert num_mapped_pools() == before
    assert not engine.has_work()


def test_bfloat16_runs_and_its_kv_takes_half_the_memory(model_dir: Path, engine: EngineDriver) -> None:
    half = engine_on(model_dir, dtype="bfloat16")
    try:
        assert 2 * half.kv_layout.block_bytes == engine.kv_layout.block_bytes
        results = run(half, [greedy(random_prompt(length)) for length in (5, 40, 70)])
        assert all(len(result.tokens) == 24 for result in results.values())
    finally:
        half.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mixed_engine_on_a_gpu_computes_what_it_does_on_the_cpu(model_dir: Path, engine: EngineDriver) -> None:
    requests = [greedy(random_prompt(length)) for length in (1, 20, 50, 70)] + SAMPLED
    on_gpu = engine_on(model_dir, device="cuda")
    try:
        found, right = run(on_gpu, requests), run(engine, requests)
        assert {key: result.tokens for key, result in found.items()} == {key: r.tokens for key, r in right.items()}
    finally:
        on_gpu.close()
