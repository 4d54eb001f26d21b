"""Two engines and two models on one topic, through the gateway: each request gets the tokens of its own model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from engine.demo.fleet import Fleet, free_port
from engine.llama_cpp.testing import make_tiny_gguf
from engine.testing import make_tiny_model
from splitwise_sched.frontend import FrontEnd
from tests.e2e.reference import generate
from tests.engine_drivers import greedy, random_prompt

NUM_OUTPUT = 16
SHARDS = ("--scheduler-shards", "3")
COMMON = ("--dtype", "float32", "--num-gpu-blocks-override", "100", "--max-num-seqs", "16", *SHARDS)


async def test_models_and_engines_of_one_topic_serve_by_name(tmp_path: Path) -> None:
    first = make_tiny_model("llama", tmp_path / "first")
    second = make_tiny_model("qwen3", tmp_path / "second", seed=1)
    gguf = make_tiny_gguf(second)
    requests = [greedy(random_prompt(length), NUM_OUTPUT) for length in (5, 40, 100)]
    expected = {"first": generate(first, requests), "second": generate(second, requests)}
    # The second model is served by a pair of each engine.
    kinds = (("transformers", first, "first"), ("transformers", second, "second"), ("llama_cpp", gguf, "second"))
    port = free_port()
    with Fleet() as fleet:
        for shard, (engine, model, name) in enumerate(kinds):
            # One process where nothing is to be learned from two.
            for role in ("prefill", "decode") if name == "second" else ("mixed",):
                flags = ("--engine", engine, "--served-model-name", name, "--scheduler-shard", str(shard), *COMMON)
                fleet.start(
                    f"{role}-{shard}",
                    ("serve", "--model", str(model), "--splitwise-role", role, "--instance-name", f"{role}-{shard}",
                     "--num-threads", "1", *flags),
                )  # fmt: skip
        fleet.start("gateway", ("gateway", "--port", str(port), *SHARDS))
        settings = fleet.settings.model_copy(update={"scheduler_shards": 3})
        async with FrontEnd(settings) as frontend, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            while len(await frontend.instances()) < 5:
                fleet.check()
                await asyncio.sleep(0.1)
            await fleet.wait_for_gateway(port)

            async def listed() -> list[str]:
                return sorted(model["id"] for model in (await client.get("/v1/models")).json()["data"])

            # The gateway looks at the fleet a few times a second.
            while await listed() != ["first", "second"]:
                fleet.check()
                await asyncio.sleep(0.05)
            pairs = set()
            for model in ("first", "second"):
                for attempt in range(4):
                    for request in requests:
                        answer = await client.post(
                            "/v1/completions",
                            json={
                                "model": model,
                                "prompt": list(request.prompt_token_ids),
                                "max_tokens": NUM_OUTPUT,
                                "temperature": 0,
                                "ignore_eos": True,
                                "return_token_ids": True,
                            },
                            headers={"X-Request-Id": f"{model}-{attempt}-{request.request_id}"},
                            timeout=60,
                        )
                        assert answer.status_code == 200, answer.text
                        (choice,) = answer.json()["choices"]
                        assert choice["token_ids"] == expected[model][request.request_id]
                        record = await frontend.request_record(f"{model}-{attempt}-{request.request_id}")
                        pairs.add((model, *(record[role].split("-")[1] for role in ("prefill", "decode"))))
            assert pairs == {("first", "0", "0"), ("second", "1", "1"), ("second", "2", "2")}
            unknown = await client.post("/v1/completions", json={"model": "third", "prompt": [5], "max_tokens": 1})
            assert unknown.status_code == 404
            assert "served are: first, second" in unknown.json()["error"]["message"]
            # One that no shard is left for, and one that was told to join those of the other engine.
            refusals = {
                ("third",): ("every shard of topic 'demo' has others", "raise --scheduler-shards"),
                ("second", "--scheduler-shard", "1"): ("kv.engine 'llama_cpp'", "has 'transformers'"),
            }
            started = {}
            for flags in refusals:
                command = (
                    "serve",
                    "--engine",
                    "llama_cpp",
                    "--model",
                    str(gguf),
                    *COMMON,
                    "--served-model-name",
                    *flags,
                )
                started[flags] = fleet.start(flags[0], command)
                del fleet.members[flags[0]]
            for flags, texts in refusals.items():
                assert await asyncio.to_thread(started[flags].process.wait, 60) == 2
                assert all(text in started[flags].log_tail for text in texts), started[flags].log_tail
        fleet.check()
