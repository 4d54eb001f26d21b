"""The same weights in transformers, vLLM and llama.cpp, each alone and disaggregated: the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from engine.llama_cpp.plugin import LlamaCppPlugin
from engine.llama_cpp.testing import make_tiny_gguf
from engine.plugins import EnginePlugin
from engine.port import EngineDriver
from engine.settings import EngineSettings
from engine.testing import make_tiny_model
from engine.transformers.plugin import TransformersPlugin
from splitwise_sched.types import Role
from tests.e2e.reference import generate
from tests.engine_drivers import greedy, random_prompt, run, run_disaggregated
from tests.vllm.engines import VllmEngine, start

LENGTHS = (5, 17, 32, 33, 64, 130, 300, 700)
REQUESTS = [greedy(random_prompt(length)) for length in LENGTHS]
PROMPTS = [request.prompt_token_ids for request in REQUESTS]
NUM_OUTPUT = REQUESTS[0].sampling.max_tokens
Tokens = dict[str, list[int]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with safetensors, and the same weights as GGUF."""
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    make_tiny_gguf(folder)
    return folder


@pytest.fixture(scope="module")
def expected(llama: Path) -> Tokens:
    tokens = generate(llama, REQUESTS)
    assert len({token for output in tokens.values() for token in output}) > 100, "too uniform to tell anything"
    return tokens


def drivers(plugin: EnginePlugin, model: Path) -> Iterator[EngineDriver]:
    """A prefill and a decode engine."""
    fields = {"dtype": "float32", "num_gpu_blocks_override": 140, "max_num_batched_tokens": 128, "max_num_seqs": 12}
    for role in (Role.PREFILL, Role.DECODE):
        settings = EngineSettings(model=str(model), served_model_name="tiny", num_threads=1, **fields)
        yield plugin.create(settings, role)


@pytest.mark.parametrize(
    ("plugin", "file"),
    [(TransformersPlugin(), "."), (LlamaCppPlugin(), "model.gguf")],
    ids=["transformers", "llama.cpp"],
)
def test_driven_engine_gives_the_tokens_of_generate(
    llama: Path, expected: Tokens, plugin: EnginePlugin, file: str
) -> None:
    prefill, decode = drivers(plugin, llama / file)
    try:
        alone = {key: result.tokens for key, result in run(prefill, REQUESTS).items()}
        results, different = run_disaggregated(prefill, decode, REQUESTS)
    finally:
        prefill.close()
        decode.close()
    assert alone == expected
    assert {key: result.tokens for key, result in results.items()} == expected
    assert not any(different.values())


def test_vllm_gives_the_tokens_of_generate(llama: Path, expected: Tokens) -> None:
    with VllmEngine(llama) as prefill, VllmEngine(llama) as decode:
        start(prefill, decode)
        sent = prefill.generate(PROMPTS, 1, [{"do_remote_decode": True, "do_remote_prefill": False} for _ in PROMPTS])
        answers = decode.generate(PROMPTS, NUM_OUTPUT, [answer.transfer for answer in sent])
        offered, arrived = prefill.blocks(), decode.blocks()
        alone = prefill.generate(PROMPTS, NUM_OUTPUT)
    assert [list(answer.token_ids) for answer in alone] == list(expected.values())
    assert [list(answer.token_ids) for answer in answers] == list(expected.values())
    assert len(offered) == len(PROMPTS) and arrived == offered, "decode went on from what prefill sent"
