"""The transformers engine computes what transformers' own generate() does: batched, chunked, and across two engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engine.port import EngineDriver  # noqa: E402
from engine.testing import ARCHITECTURES, make_tiny_model  # noqa: E402
from engine.transformers import TransformersOptions, create  # noqa: E402
from kv_transfer.layout import check_compatible  # noqa: E402
from kv_transfer.memory import KVPool  # noqa: E402
from tests.engine_drivers import greedy, random_prompt, run, run_disaggregated  # noqa: E402

NUM_OUTPUT = 24
# Around the block size (16), the sliding window (24) and the chunk budget (64).
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 24, 25, 63, 64, 65, 130, 300)
REQUESTS = [greedy(random_prompt(length), NUM_OUTPUT) for length in PROMPT_LENGTHS]


@dataclass(frozen=True)
class Subject:
    """A model, and what generate() makes of each prompt."""

    path: Path
    expected: dict[str, list[int]]


def engine_on(path: Path, **options: Any) -> EngineDriver:
    settings = {"num_blocks": 120, "max_num_batched_tokens": 64, "max_num_seqs": 12, "num_threads": 1, **options}
    return create(TransformersOptions(model=str(path), **settings))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    settings = transformers.GenerationConfig(max_new_tokens=NUM_OUTPUT, do_sample=False, pad_token_id=0)
    model.generation_config.eos_token_id = None
    expected = {}
    for item in REQUESTS:
        prompt = torch.tensor([item.prompt_token_ids])
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        expected[item.request_id] = output[0, prompt.shape[1] :].tolist()
    return Subject(path, expected)


@pytest.fixture
def prefill(subject: Subject) -> Iterator[EngineDriver]:
    engine = engine_on(subject.path)
    yield engine
    engine.close()


@pytest.fixture
def decode(subject: Subject) -> Iterator[EngineDriver]:
    # Another budget and another pool: block ids differ between the two engines.
    engine = engine_on(subject.path, num_blocks=101, max_num_batched_tokens=512)
    yield engine
    engine.close()


def test_output_of_a_random_model_is_varied_enough_to_tell_anything(subject: Subject) -> None:
    outputs = list(subject.expected.values())
    assert all(len(tokens) == NUM_OUTPUT for tokens in outputs)
    assert len({token_id for tokens in outputs for token_id in tokens}) > 100
    assert len({tuple(tokens) for tokens in outputs}) == len(outputs)


def test_batched_and_chunked_output_equals_generate(subject: Subject, prefill: EngineDriver) -> None:
    results = run(prefill, REQUESTS)
    assert {key: result.tokens for key, result in results.items()} == subject.expected
    assert prefill.load().num_free_blocks == prefill.spec.num_blocks


def test_disaggregated_output_equals_generate(subject: Subject, prefill: EngineDriver, decode: EngineDriver) -> None:
    check_compatible(prefill.kv_layout, decode.kv_layout)
    decode.reserve("shifts-block-ids", greedy(random_prompt(20)))
    results, different = run_disaggregated(prefill, decode, REQUESTS)
    assert {key: result.tokens for key, result in results.items()} == subject.expected
    assert different == {key: [] for key in results}


def test_one_zeroed_block_in_one_layer_changes_the_tokens(
    subject: Subject, prefill: EngineDriver, decode: EngineDriver
) -> None:
    layer, index = 1, 0

    def damage(pool: KVPool, block_ids: Sequence[int]) -> None:
        pool.block_view(block_ids[index], layer)[:] = 0

    # Shorter than the sliding window, so that the damaged block is within sight of every layer.
    requests = [greedy(random_prompt(length), NUM_OUTPUT) for length in (2, 15, 16, 17)]
    results, different = run_disaggregated(prefill, decode, requests, damage=damage)
    for request in requests:
        assert different[request.request_id] == [(layer, index)]
        assert results[request.request_id].tokens != subject.expected[request.request_id]
