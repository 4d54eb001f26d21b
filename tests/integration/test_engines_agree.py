"""The same weights in every engine: the same tokens, alone and disaggregated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from engine.llama_cpp.plugin import LlamaCppPlugin
from engine.llama_cpp.testing import ARCHITECTURES, make_tiny_gguf
from engine.plugins import EnginePlugin
from engine.port import EngineDriver
from engine.settings import EngineSettings
from engine.testing import make_tiny_model
from engine.transformers.plugin import TransformersPlugin
from splitwise_sched.types import Request, Role, SamplingParams
from tests.e2e.reference import generate
from tests.engine_drivers import greedy, random_prompt, run, run_disaggregated

LENGTHS = (1, 5, 16, 17, 33, 64, 130, 300, 700)
GREEDY = [greedy(random_prompt(length)) for length in LENGTHS]
SAMPLED = [
    Request(
        f"s{length}",
        "tiny",
        random_prompt(length),
        SamplingParams(max_tokens=16, temperature=0.8, top_p=0.9, top_k=40, seed=length, ignore_eos=True),
    )
    for length in LENGTHS
]


def engine_on(plugin: EnginePlugin, model: Path, role: Role = Role.MIXED) -> EngineDriver:
    fields = {"dtype": "float32", "num_gpu_blocks_override": 140, "max_num_batched_tokens": 64, "max_num_seqs": 12}
    return plugin.create(EngineSettings(model=str(model), served_model_name="tiny", num_threads=1, **fields), role)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    make_tiny_gguf(folder)
    return folder


@pytest.fixture
def engines(model: Path) -> Iterator[tuple[EngineDriver, EngineDriver, EngineDriver]]:
    """transformers, and llama.cpp twice."""
    gguf = model / "model.gguf"
    made = (
        engine_on(TransformersPlugin(), model),
        engine_on(LlamaCppPlugin(), gguf, Role.PREFILL),
        engine_on(LlamaCppPlugin(), gguf, Role.DECODE),
    )
    yield made
    for engine in made:
        engine.close()


def test_greedy_tokens_are_those_of_generate_in_every_engine_alone_and_disaggregated(model: Path, engines) -> None:
    reference, prefill, decode = engines
    expected = generate(model, GREEDY)
    assert len({token for tokens in expected.values() for token in tokens}) > 100, "too uniform to tell anything"
    for results in (run(reference, GREEDY), run(prefill, GREEDY)):
        assert {key: result.tokens for key, result in results.items()} == expected
    results, different = run_disaggregated(prefill, decode, GREEDY)
    assert {key: result.tokens for key, result in results.items()} == expected
    assert not any(different.values())


def test_sampled_tokens_are_the_same_in_every_engine(engines) -> None:
    reference, prefill, _ = engines
    tokens = [{k: r.tokens for k, r in run(engine, SAMPLED).items()} for engine in (reference, prefill)]
    assert tokens[0] == tokens[1]
