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
from engine.llama_cpp.blob import HEADER_BYTES, beginning, seal, unseal
from engine.llama_cpp.engine import LlamaCppEngine
from engine.llama_cpp.plugin import LlamaCppPlugin
from engine.llama_cpp.testing import SLIDING_WINDOW_ARCHITECTURE, make_tiny_gguf
from engine.port import BlocksReady, EngineDriver, Mode, TokensOut
from engine.settings import EngineSettings
from engine.testing import make_tiny_model
from kv_transfer.errors import LayoutMismatch
from kv_transfer.layout import check_compatible
from splitwise_sched.errors import ConfigError, InvalidRequest
from splitwise_sched.tokenizer import Tokenizer
from splitwise_sched.types import FinishReason, Request, Role
from tests.engine_drivers import greedy, random_prompt, run, run_disaggregated


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
                places = list(reserved)[event.first_index : event.first_index + len(event.block_ids)]
                target.kv_pools[0].as_array()[places] = source.kv_pools[0].as_array()[list(event.block_ids)]
            else:
                first = event
    source.release(key)
    assert first is not None
    return first, list(reserved)


def cells_in_use(engine: LlamaCppEngine) -> int:
    """Of all sequences, the one that carries KV in and out with them."""
    fixed, per_token = engine._model.state_bytes
    assert engine._context is not None
    sizes = [engine._context.state_bytes(seq_id) for seq_id in range(engine.spec.max_num_seqs + 1)]
    return sum(max(0, size - fixed) for size in sizes) // per_token


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


def flip_one_bit_at_the_end(blocks: np.ndarray) -> np.ndarray:
    blocks[-2, blocks.shape[1] // 2] ^= 1
    return blocks


def swap(blocks: np.ndarray) -> np.ndarray:
    return blocks[[1, 0, *range(2, len(blocks))]]


# Pieces are of two blocks: a step has 32 tokens.
def swap_pieces(blocks: np.ndarray) -> np.ndarray:
    return blocks[[2, 3, 0, 1, *range(4, len(blocks))]]


def double_a_piece(blocks: np.ndarray) -> np.ndarray:
    return blocks[[0, 1, 0, 1, *range(4, len(blocks))]]


def skip_a_piece(blocks: np.ndarray) -> np.ndarray:
    return blocks[[0, 1, *range(4, len(blocks)), 0, 0]]


DAMAGES = (truncate, flip_one_bit, flip_one_bit_at_the_end, swap, swap_pieces, double_a_piece, skip_a_piece,
           np.zeros_like)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_kv_is_refused_and_the_request_computed_again(engine, other, damage) -> None:
    request = greedy(random_prompt(90))
    first, reserved = send(engine, other, request)
    pool = other.kv_pools[0].as_array()
    pool[reserved] = damage(pool[reserved].copy())
    with pytest.raises(KVRejected, match="r90"):
        other.commit("r90", first)
    other.abort("r90")
    assert cells_in_use(other) == 0, "what was taken in before the damage was seen is given back"
    again, _ = send(engine, other, request)
    other.commit("r90", again)
    assert finish(other, again) == run(engine, [request])["r90"].tokens


@pytest.mark.parametrize("tokens_a_step", [8, 16, 20, 32, 50, 128])
def test_kv_goes_out_while_later_chunks_compute(model, engine, other, tokens_a_step) -> None:
    """A piece a step, of the whole blocks that it has made complete; decode need not know how long they are."""
    source = engine_on(model, Role.PREFILL, max_num_batched_tokens=tokens_a_step)
    try:
        request = greedy(random_prompt(100))
        source.submit("r100", request, Mode.PREFILL)
        seen = []
        while source.has_work():
            seen.append([len(e.block_ids) for e in source.step() if isinstance(e, BlocksReady)])
        source.release("r100")
        computed = [min(100, (i + 1) * tokens_a_step) for i in range(len(seen))]
        complete = [7 if end == 100 else end // 16 for end in computed]
        new = [after - before for before, after in zip([0, *complete], complete, strict=False)]
        assert seen == [[count] if count else [] for count in new]
        first, _ = send(source, other, request)
        other.commit("r100", first)
        assert finish(other, first) == run(engine, [request])["r100"].tokens
        assert source.load().num_free_blocks == source.spec.num_blocks
        assert cells_in_use(source) == 0
    finally:
        source.close()


def test_model_with_sliding_windows_is_sent_whole(tmp_path: Path) -> None:
    """Its layers reuse cells that have left the window, so that a chunk by itself may lack some of its own."""
    shape = {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "initializer_range": 0.01}
    path = make_tiny_gguf(make_tiny_model(SLIDING_WINDOW_ARCHITECTURE, tmp_path, **shape))
    requests = [greedy(random_prompt(length)) for length in (1, 20, 33, 70, 300)]
    prefill, decode = engine_on(path, Role.PREFILL), engine_on(path, Role.DECODE)
    try:
        expected = {key: result.tokens for key, result in run(prefill, requests).items()}
        assert len({token for tokens in expected.values() for token in tokens}) > 12, "too uniform to tell anything"
        results, _ = run_disaggregated(prefill, decode, requests)
        assert {key: result.tokens for key, result in results.items()} == expected
        prefill.submit("whole", requests[-1], Mode.PREFILL)
        sent = []
        while prefill.has_work():
            sent += [e for e in prefill.step() if isinstance(e, BlocksReady)]
        assert [(e.first_index, len(e.block_ids), e.is_last) for e in sent] == [(0, 19, True)]
        prefill.release("whole")
    finally:
        prefill.close()
        decode.close()


def test_cleared_context_leaves_alone_what_a_prefill_has_given_out(engine, other) -> None:
    """The context is cleared between the chunks of a prompt: its first blocks may be on their way by then."""
    request = greedy(random_prompt(90))
    expected = run(other, [request])["r90"].tokens
    reserved = other.reserve("r90", request)
    assert reserved is not None
    pools = [e.kv_pools[0].as_array() for e in (engine, other)]
    engine.submit("r90", request, Mode.PREFILL)
    indices, given, first = [], {}, None
    for turn in range(20):
        if turn == 1:
            engine._must_clear = True
        for event in engine.step():
            if isinstance(event, TokensOut):
                first = event
                continue
            for index, block_id in enumerate(event.block_ids, event.first_index):
                indices.append(index)
                given[block_id] = pools[0][block_id].copy()
                pools[1][reserved[index]] = given[block_id]
    assert indices == list(range(6))
    assert all((pools[0][block_id] == data).all() for block_id, data in given.items())
    engine.release("r90")
    assert first is not None
    other.commit("r90", first)
    assert finish(other, first) == expected


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
    before = beginning(other.kv_layout.model)
    forged = pool[reserved].reshape(-1)
    state, after = unseal(forged.copy(), before, request.prompt_token_ids)
    state[16:40] = 0xFF
    forged[:HEADER_BYTES] = np.frombuffer(seal(state, before, after), np.uint8)
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
    sealed = pool[reserved].reshape(-1)
    before = beginning(other.kv_layout.model)
    state, middle = unseal(sealed.copy(), before, bad.prompt_token_ids)
    state[-2000:].view(np.float32)[:] = np.nan
    sealed[:HEADER_BYTES] = np.frombuffer(seal(state, before, middle), np.uint8)
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
        ({"max_num_seqs": 256, "max_num_batched_tokens": 512}, "255 at most"),
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
