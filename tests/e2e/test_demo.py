"""``splitwise-sched demo`` as a user runs it: everything started, every token compared, everything stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.testing import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitwise_sched", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_every_token_of_64_requests_on_four_instances_equals_generate(model, tmp_path, transport):
    found_file = tmp_path / "found.json"
    done = demo("--model", model, "--transport", transport, "--requests", 64, "--json", found_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every token of all 64 answers equals generate()" in " ".join(done.stdout.split())
    found = json.loads(found_file.read_text())
    assert (found["requests"], found["matched"], found["mismatched"]) == (64, 64, 0)
    assert (found["prefill_instances"], found["decode_instances"]) == (2, 2)
    assert found["instances_used"] == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    assert found["transport"] == transport and found["kv_bytes_moved"] > 0
    assert found["redis_server"].startswith(("redis", "valkey"))
    for name in ("ttft_s", "tpot_s"):
        assert 0 < found[name]["p50"] <= found[name]["p99"]
    prompts = [row["prompt_tokens"] for row in found["per_request"]]
    assert min(prompts) == 1 and max(prompts) == 1500
    row = found["per_request"][0]
    assert {"prefill_instance", "decode_instance", "queue_ms", "prefill_ms", "transfer_ms", "decode_ms"} <= row.keys()
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if str(model) in (p.info["cmdline"] or ())]
    assert left == []


def test_every_token_of_streams_whose_instances_are_killed_and_stalled_equals_generate(model, tmp_path):
    found_file = tmp_path / "found.json"
    done = demo("--model", model, "--chaos", "--chaos-s", 10, "--requests", 12, "--json", found_file)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(found_file.read_text())
    facts = found["chaos"]
    assert found["mismatched"] == facts["failed"] == 0 and found["matched"] == found["requests"] >= 12
    assert min(facts[fault] for fault in ("killed_prefill", "killed_decode", "stalled_decode")) >= 1
    assert facts["requests_run_again"] > 0 and facts["reruns"] >= facts["requests_run_again"]
    text = " ".join(done.stdout.split())
    assert "stopped decode-" in text and "were run again, 0 failed" in text


def test_every_token_of_llama_cpp_instances_equals_llama_cpp_alone(model, tmp_path):
    pytest.importorskip("xllamacpp")
    testing = pytest.importorskip("engine.llama_cpp.testing")
    gguf, found_file = testing.make_tiny_gguf(model), tmp_path / "found.json"
    flags = ("--prefill", 1, "--decode", 2, "--requests", 12, "--kv-blocks", 128, "--json", found_file)
    done = demo("--engine", "llama_cpp", "--model", gguf, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every token of all 12 answers equals llama_cpp alone" in " ".join(done.stdout.split())
    found = json.loads(found_file.read_text())
    assert (found["matched"], found["transport"], found["model"]) == (12, "shm", str(gguf))
    assert found["instances_used"] == ["decode-0", "decode-1", "prefill-0"]
    alone = gguf.rename(tmp_path / "alone.gguf")
    for arguments, words in (
        (("--engine", "llama_cpp"), "--engine llama_cpp: give its --model too"),
        (("--engine", "llama_cpp", "--model", alone), "there is no tokenizer.json beside it"),
        (("--engine", "llama_cpp", "--model", gguf), "there is no such file"),
        (("--engine", "nope"), "--engine nope: there is no such engine; registered are:"),
    ):
        done = demo(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert words in " ".join(done.stderr.split())


def test_model_that_is_nowhere_ends_in_a_paragraph(tmp_path):
    done = demo("--model", tmp_path / "nothing")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is no directory here" in done.stderr and "hub id" in done.stderr
