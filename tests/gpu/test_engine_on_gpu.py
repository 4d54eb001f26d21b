"""The transformers engine on a GPU: the same tokens as generate() on that GPU, alone and across two pools."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engine.conformance.driving import Result, run  # noqa: E402
from engine.port import BlocksReady, EngineDriver, Mode, TokensOut  # noqa: E402
from engine.testing import make_tiny_model  # noqa: E402
from engine.transformers import TransformersOptions, create  # noqa: E402
from kv_transfer import Messenger, Received, Sent, TransferOptions  # noqa: E402
from splitwise_sched.types import Request, Role, SamplingParams  # noqa: E402
from tests.engine_drivers import greedy, random_prompt  # noqa: E402

pytestmark = pytest.mark.gpu

NUM_OUTPUT = 24
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130, 300)
REQUESTS = [greedy(random_prompt(length), NUM_OUTPUT) for length in LENGTHS]
# bfloat16 has 8 bits of precision: log-probabilities of chosen tokens, each way computed in its own order of sums.
MAX_DIFFERENCE, MEAN_DIFFERENCE = 0.5, 0.05


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to("cuda").eval()
    found.generation_config.eos_token_id = None
    return found


@pytest.fixture(scope="module")
def expected(model: Any) -> dict[str, list[int]]:
    settings = transformers.GenerationConfig(max_new_tokens=NUM_OUTPUT, do_sample=False, pad_token_id=0)
    answers = {}
    for request in REQUESTS:
        prompt = torch.tensor([request.prompt_token_ids], device="cuda")
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        answers[request.request_id] = output[0, prompt.shape[1] :].tolist()
    return answers


def engine_on(path: Path, **options: Any) -> EngineDriver:
    settings = {"num_blocks": 120, "max_num_batched_tokens": 64, "max_num_seqs": 12, **options}
    return create(TransformersOptions(model=str(path), device="cuda", role=Role.PREFILL, **settings))


@pytest.fixture
def prefill(path: Path) -> Iterator[EngineDriver]:
    engine = engine_on(path)
    yield engine
    engine.close()


@pytest.fixture
def decode(path: Path) -> Iterator[EngineDriver]:
    engine = engine_on(path, num_blocks=101, max_num_batched_tokens=512)
    yield engine
    engine.close()


def test_batched_and_chunked_output_equals_generate(prefill: EngineDriver, expected: dict[str, list[int]]) -> None:
    results = run(prefill, REQUESTS)
    assert {key: result.tokens for key, result in results.items()} == expected


def test_output_across_two_pools_equals_generate_while_blocks_move_during_prefill(
    prefill: EngineDriver, decode: EngineDriver, expected: dict[str, list[int]]
) -> None:
    results = run_transferred(prefill, decode, REQUESTS)
    assert {key: result.tokens for key, result in results.items()} == expected


def run_transferred(prefill: EngineDriver, decode: EngineDriver, requests: list[Request]) -> dict[str, Result]:
    """As two instances do it: blocks are given to the messenger as they are reported, with no synchronisation."""
    options, news = TransferOptions(protocols=("cuda_ipc",)), threading.Event()
    (source,), (target,) = prefill.kv_pools, decode.kv_pools
    results: dict[str, Result] = {}
    with (
        Messenger(source, options, name="prefill") as sender,
        Messenger(target, options, name="decode", on_event=news.set) as receiver,
    ):
        firsts: dict[str, TokensOut] = {}
        for request in requests:
            key = request.request_id
            results[key] = Result()
            prefill.submit(key, request, Mode.PREFILL)
            blocks = decode.reserve(key, request)
            assert blocks is not None
            sender.open_send(key, num_blocks=len(blocks), deadline_s=60)
            receiver.open_receive(key, [sender.endpoint], blocks, deadline_s=60)
        while prefill.has_work():
            for event in prefill.step():
                if isinstance(event, BlocksReady):
                    sender.send_blocks(event.key, event.first_index, event.block_ids)
                else:
                    results[event.key].add(event, 0)
                    firsts[event.key] = event
                    sender.finish_send(event.key, b"")
        until, missing = time.monotonic() + 60, set(firsts)
        while missing:
            news.wait(0.1)
            news.clear()
            assert time.monotonic() < until
            for done in receiver.poll():
                assert isinstance(done, Received), done
                missing.discard(done.transfer_id)
                decode.commit(done.transfer_id, firsts[done.transfer_id])
        assert wait_sent(sender, len(firsts), until)
        for key in firsts:
            prefill.release(key)
        while decode.has_work():
            for event in decode.step():
                assert isinstance(event, TokensOut)
                results[event.key].add(event, 0)
    return results


def wait_sent(sender: Messenger, count: int, until: float) -> bool:
    """Until so many transfers are confirmed: then nobody reads the blocks any more."""
    while count and time.monotonic() < until:
        count -= sum(isinstance(event, Sent) for event in sender.poll())
        time.sleep(0.001)
    return not count


def test_bfloat16_log_probabilities_are_those_of_a_plain_forward_pass_within_bounds(path: Path) -> None:
    sampling = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True, logprobs=0)
    requests = [Request(f"b{n}", "tiny", random_prompt(n), sampling) for n in LENGTHS]
    engine = engine_on(path, dtype="bfloat16")
    try:
        results = run(engine, requests)
    finally:
        engine.close()
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to("cuda").eval()
    differences = []
    with torch.inference_mode():
        for request in requests:
            result, start = results[request.request_id], len(request.prompt_token_ids) - 1
            tokens = torch.tensor([[*request.prompt_token_ids, *result.tokens]], device="cuda")
            right = plain(tokens).logits[0, start:-1].float().log_softmax(-1)
            for position, (token_id, got) in enumerate(zip(result.tokens, result.logprobs, strict=True)):
                differences.append(abs(got.logprob - right[position, token_id].item()))
    assert max(differences) <= MAX_DIFFERENCE
    assert sum(differences) / len(differences) <= MEAN_DIFFERENCE
