"""The llama.cpp engine beyond the conformance suite: what it is given, what comes from a peer, and what it refuses."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from engine.errors import KVRejected
from engine.llama_cpp import library
from engine.llama_cpp.blob import HEADER_BYTES, digest_of, seal, unseal
from engine.llama_cpp.engine import LlamaCppEngine
from engine.llama_cpp.plugin import LlamaCppPlugin
from engine.llama_cpp.testing import make_tiny_gguf
from engine.port import BlocksReady, EngineDriver, Mode, TokensOut
from engine.settings import EngineSettings
from engine.testing import make_tiny_model
from kv_transfer.errors import LayoutMismatch
from kv_transfer.layout import check_compatible
from splitwise_sched.errors import ConfigError, InvalidRequest
from splitwise_sched.tokenizer import Tokenizer
from splitwise_sched.types import FinishReason, Request, Role
from tests.engine_drivers import greedy, random_prompt, run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3")))


def engine_on(path: Path | str, role: Role = Role.MIXED, **fields: Any) -> LlamaCppEngine:
    settings = {
        "served_model_name": "tiny",
        "dtype": "float32",
        "num_gpu_blocks_override": 64,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 8,
        "num_threads": 1,
        **fields,
    }
    engine = LlamaCppPlugin().create(EngineSettings(engine="llama_cpp", model=str(path), **settings), role)
    assert isinstance(engine, LlamaCppEngine)
    return engine


@pytest.fixture
def engine(model: Path) -> Iterator[LlamaCppEngine]:
    engine = engine_on(model)
    yield engine
    assert engine.load().num_free_blocks == engine.spec.num_blocks
    engine.close()


@pytest.fixture
def other(model: Path) -> Iterator[LlamaCppEngine]:
    engine = engine_on(model, num_gpu_blocks_override=90)
    yield engine
    assert engine.load().num_free_blocks == engine.spec.num_blocks
    engine.close()


def send(source: EngineDriver, target: EngineDriver, request: Request) -> tuple[TokensOut, list[int]]:
    """Prefill on one, with the KV copied to reserved blocks of the other; the first token and those blocks."""
    key = request.request_id
    reserved = target.reserve(key, request)
    assert reserved is not None
    source.submit(key, request, Mode.PREFILL)
    first = None
    while source.has_work():
        for event in source.step():
            if isinstance(event, BlocksReady):
                target.kv_pools[0].as_array()[list(reserved)] = source.kv_pools[0].as_array()[list(event.block_ids)]
            else:
                first = event
    source.release(key)
    assert first is not None
    return first, list(reserved)


def finish(engine: EngineDriver, first: TokensOut) -> list[int]:
    tokens = list(first.token_ids)
    while engine.has_work():
        tokens += [t for event in engine.step() if isinstance(event, TokensOut) for t in event.token_ids]
    return tokens


def truncate(blocks: np.ndarray) -> np.ndarray:
    blocks[-1] = 0
    return blocks


def flip_one_bit(blocks: np.ndarray) -> np.ndarray:
    blocks[1, blocks.shape[1] // 2] ^= 1
    return blocks


def swap(blocks: np.ndarray) -> np.ndarray:
    return blocks[[1, 0, *range(2, len(blocks))]]


@pytest.mark.parametrize("damage", [truncate, flip_one_bit, swap, np.zeros_like])
def test_damaged_kv_is_refused_and_the_request_computed_again(engine, other, damage) -> None:
    request = greedy(random_prompt(60))
    first, reserved = send(engine, other, request)
    pool = other.kv_pools[0].as_array()
    pool[reserved] = damage(pool[reserved].copy())
    with pytest.raises(KVRejected, match="r60"):
        other.commit("r60", first)
    other.abort("r60")
    again, _ = send(engine, other, request)
    other.commit("r60", again)
    assert finish(other, again) == run(engine, [request])["r60"].tokens


def test_kv_of_another_request_is_refused(engine, other) -> None:
    mine, theirs = (
        greedy(random_prompt(40, seed=1), request_id="mine"),
        greedy(random_prompt(40, seed=2), request_id="theirs"),
    )
    first, my_blocks = send(engine, other, mine)
    _, their_blocks = send(engine, other, theirs)
    pool = other.kv_pools[0].as_array()
    pool[my_blocks] = pool[their_blocks]
    with pytest.raises(KVRejected, match="another input or model"):
        other.commit("mine", first)
    other.abort("mine")
    other.abort("theirs")


def test_sealed_state_that_llama_cpp_itself_does_not_take_is_refused(engine, other) -> None:
    request = greedy(random_prompt(20))
    first, reserved = send(engine, other, request)
    pool = other.kv_pools[0].as_array()
    digest = digest_of(other.kv_layout.model, request.prompt_token_ids)
    forged = pool[reserved].reshape(-1)
    state = unseal(forged.copy(), digest, 20)
    state[16:40] = 0xFF
    forged[:HEADER_BYTES] = np.frombuffer(seal(state, digest, 20), np.uint8)
    forged[HEADER_BYTES : HEADER_BYTES + len(state)] = state
    pool[reserved] = forged.reshape(len(reserved), -1)
    with pytest.raises(KVRejected, match=r"llama\.cpp does not take it"):
        other.commit("r20", first)
    other.abort("r20")
    assert run(other, [request]) == run(engine, [request])


def test_kv_is_taken_into_a_context_whose_free_cells_are_scattered(engine, other) -> None:
    short = [greedy(random_prompt(10, seed=i), 20, f"s{i}") for i in range(7)]
    for request in short:
        other.submit(request.request_id, request, Mode.FULL)
    for _ in range(4):
        other.step()
    for request in short[::2]:
        other.abort(request.request_id)
    requests = [greedy(random_prompt(length)) for length in (30, 45, 70)]
    expected = run(engine, requests)
    for request in requests:
        first, _ = send(engine, other, request)
        other.commit(request.request_id, first)
    got: dict[str, list[int]] = {r.request_id: expected[r.request_id].tokens[:1] for r in requests}
    while other.has_work():
        for event in other.step():
            assert isinstance(event, TokensOut)
            got.setdefault(event.key, []).extend(event.token_ids)
    assert {key: got[key] for key in expected} == {key: result.tokens for key, result in expected.items()}


def test_context_with_kv_that_is_not_a_number_is_cleared_before_the_next_request(engine, other) -> None:
    # The good one writes fewer cells than the bad one leaves, in the same page of cells.
    bad, good = greedy(random_prompt(60), request_id="bad"), greedy(random_prompt(10), 20, "good")
    expected = run(engine, [good])["good"]
    first, reserved = send(engine, other, bad)
    pool = other.kv_pools[0].as_array()
    digest = digest_of(other.kv_layout.model, bad.prompt_token_ids)
    sealed = pool[reserved].reshape(-1)
    state = unseal(sealed.copy(), digest, 60)
    state[-2000:].view(np.float32)[:] = np.nan
    sealed[:HEADER_BYTES] = np.frombuffer(seal(state, digest, 60), np.uint8)
    sealed[HEADER_BYTES : HEADER_BYTES + len(state)] = state
    pool[reserved] = sealed.reshape(len(reserved), -1)
    other.commit("bad", first)
    (failed,) = other.step()
    assert isinstance(failed, TokensOut)
    assert failed.finish_reason is FinishReason.ERROR and "finite" in str(failed.detail)
    assert run(other, [good])["good"] == expected


def test_kv_in_and_out_never_wait_for_each_others_blocks(model, engine) -> None:
    small = engine_on(model, num_gpu_blocks_override=16, max_model_len=64, max_num_seqs=8)
    try:
        assert small.kv_layout.num_blocks == 8
        for i in range(2):
            assert small.reserve(f"in{i}", greedy(random_prompt(30))) is not None
        assert small.reserve("no room to take it in", greedy(random_prompt(10))) is None
        small.submit("out", greedy(random_prompt(60), 4), Mode.PREFILL)
        events = [event for _ in range(2) for event in small.step()]
        assert any(isinstance(event, BlocksReady) for event in events)
        small.submit("waits", greedy(random_prompt(20), 4), Mode.PREFILL)
        assert not small.has_work()
        small.release("out")
        assert small.has_work()
    finally:
        small.close()


def test_stop_string_and_default_kv_type(model, engine) -> None:
    request = greedy(random_prompt(20), 24)
    tokens = run(engine, [request])["r20"].tokens
    text = Tokenizer.from_pretrained_dir(model.parent).decode(tokens[:12])
    stop = text[-3:]
    stopping = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, stop=(stop,)))
    result = run(engine, [stopping])["r20"]
    assert result.tokens == tokens[: len(result.tokens)] and len(result.tokens) <= 12
    assert (result.finish_reason, result.stop_reason) == (FinishReason.STOP, stop)
    half = engine_on(model, dtype="auto")
    try:
        assert half.kv_layout.dtype == "float16"
        assert 2 * half.kv_layout.block_bytes < 1.1 * engine.kv_layout.block_bytes
        assert len(run(half, [request])["r20"].tokens) == 24
        with pytest.raises(LayoutMismatch):
            check_compatible(half.kv_layout, engine.kv_layout)
    finally:
        half.close()


def test_end_tokens_are_those_of_the_file(model, engine) -> None:
    assert engine._model.vocabulary.end_token_ids() == {2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "No such file"),
        (".", "is a directory"),
        ("text.gguf", "is not a GGUF file"),
        ("cut.gguf", "cannot load"),
        ("part-00001-of-00002.gguf", "part-00002-of-00002.gguf"),
    ],
)
def test_model_file_that_cannot_be_served_is_refused(model: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "text.gguf").write_text("once upon a time")
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:100_000])
    shutil.copy(model, tmp_path / "part-00001-of-00002.gguf")
    with pytest.raises(ConfigError, match=message):
        engine_on(tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "cuda"}, "cpu alone"),
        ({"max_num_seqs": 300, "max_num_batched_tokens": 512}, "256 at most"),
        ({"max_num_seqs": 64}, "each sequence needs a token"),
        ({"max_model_len": 4096}, "made for 2048"),
        ({"max_model_len": 2000}, "holds 1024"),
        ({"kv_memory_mb": 64}, "give one of them"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(model: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_on(model, **fields)


def test_pool_is_sized_by_memory_when_no_blocks_are_given(model: Path) -> None:
    engine = engine_on(model, num_gpu_blocks_override=None, kv_memory_mb=8)
    try:
        used = engine.spec.num_blocks * engine.kv_layout.block_bytes
        assert 3 << 20 < used <= 4.1 * (1 << 20)
    finally:
        engine.close()


def test_other_version_of_the_wheel_is_refused_by_both_versions() -> None:
    with pytest.raises(ConfigError, match=rf"xllamacpp 2030\.1 is installed.*{library.VERSION}.*pip install"):
        library.check_version("2030.1")


def test_library_whose_structs_read_otherwise_is_refused() -> None:
    params = library.load_library().api.llama_context_default_params()
    params.n_ctx = 4711
    with pytest.raises(ConfigError, match=r"ContextParams\.n_ctx reads as 4711 where"):
        library.check_defaults(params, library._CONTEXT_DEFAULTS)


def test_closing_frees_the_pool_and_may_be_repeated(model: Path) -> None:
    engine = engine_on(model)
    engine.submit("a", greedy(random_prompt(20)), Mode.FULL)
    engine.step()
    engine.close()
    engine.close()
    assert engine.kv_pools == ()


def test_request_that_is_too_long_is_refused(engine) -> None:
    with pytest.raises(InvalidRequest, match="together 1025"):
        engine.check(greedy(random_prompt(1000), 25))
