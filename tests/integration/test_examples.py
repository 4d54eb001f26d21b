"""The programs of docs/examples run as docs/embedding.md says, and the guide shows what they are."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = DOCS / "examples"
GUIDE = DOCS / "embedding.md"
TIMEOUT_S = 60
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PREFIX = "pd:{toy:0}:"


def command(program: str, *arguments: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / program), *map(str, arguments)]


def output_of(program: str, *arguments: object) -> str:
    done = subprocess.run(
        command(program, *arguments), env=ENVIRONMENT, timeout=TIMEOUT_S, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def monolithic_answers() -> list[str]:
    answers = sorted(output_of("toy_loop.py").splitlines())
    assert len(answers) == 200
    return answers


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other processes do in Redis."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Toy:
    """Instances of the toy loop on one server."""

    def __init__(self, server, transports: str) -> None:
        self.address = f"{server.host}:{server.port}"
        self.redis = server.client(decode_responses=True)
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.asking: list[subprocess.Popen[str]] = []
        self._transports = transports

    def start(self, role: str) -> str:
        """The instance's id, when it serves."""
        process = subprocess.Popen(
            command("toy_loop_pd.py", role, self.address, self._transports),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        instance_id, _, rest = process.stdout.readline().partition(" ")
        assert rest == "serves\n", process.communicate(timeout=TIMEOUT_S)
        self.processes[instance_id] = process
        return instance_id

    def start_asking(self) -> subprocess.Popen[str]:
        asking = subprocess.Popen(
            command("ask.py", "answers", self.address), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
        )
        self.asking.append(asking)
        return asking

    def holds(self, instance_id: str, state: str) -> bool:
        """Whether a decode instance has a request in this state."""
        held = [fields["id"] for _, fields in self.redis.xrange(f"{PREFIX}inbox:{instance_id}")]
        return any(self.redis.hget(f"{PREFIX}request:{i}", "state") == state for i in held)

    def records(self) -> list[dict[str, str]]:
        return [self.redis.hgetall(key) for key in self.redis.scan_iter(f"{PREFIX}request:*", count=1000)]

    def drain(self, instance_id: str) -> None:
        process = self.processes.pop(instance_id)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors


@contextmanager
def toy(server, transports: str = "ipc,tcp") -> Iterator[Toy]:
    """At the end the instances that are left drain, and leave nothing of theirs in Redis."""
    running = Toy(server, transports)
    try:
        yield running
        for instance_id in list(running.processes):
            running.drain(instance_id)
        assert not running.redis.smembers(f"{PREFIX}instances")
    finally:
        for process in (*running.processes.values(), *running.asking):
            process.kill()
            process.communicate()
        running.redis.close()


def finish(asking: subprocess.Popen[str]) -> list[str]:
    stdout, _ = asking.communicate(timeout=TIMEOUT_S)
    assert asking.returncode == 0
    return sorted(stdout.splitlines())


def load_toy_model():
    spec = importlib.util.spec_from_file_location("toy_model", EXAMPLES / "toy_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_each_byte_of_the_toy_models_kv_counts():
    toy_model = load_toy_model()
    model = toy_model.ToyModel(np.zeros(toy_model.KV_SHAPE, np.uint8))
    blocks = [5, 900, 33]
    model.forward(range(100, 111), 0, blocks)
    right = model.forward([7], 11, blocks)
    for index in np.ndindex(2, toy_model.BLOCK_SIZE, toy_model.HEAD_DIM):
        for block in blocks:
            if block == 33 and index[1] == 3:
                continue  # the newest token's own, which forward writes
            model.kv[(block, *index)] ^= 1
            assert model.forward([7], 11, blocks) != right
            model.kv[(block, *index)] ^= 1
    assert model.forward([7], 11, [900, 5, 33]) != right
    assert model.forward([7], 11, blocks) == right


@pytest.mark.parametrize(("transports", "lane"), [("ipc,tcp", "shm"), ("tcp", "tcp")])
def test_disaggregated_loop_gives_the_tokens_of_the_monolithic_one(
    private_redis_server, monolithic_answers, transports, lane
):
    with toy(private_redis_server, transports) as running:
        prefill, decode = running.start("prefill"), running.start("decode")
        assert finish(running.start_asking()) == monolithic_answers
        for record in running.records():
            assert (record["prefill"], record["decode"]) == (prefill, decode)
            assert (record["state"], record["lane"], record["attempts"]) == ("done", lane, "1")
            num_blocks = -(-int(record["input_tokens"]) // 4)
            assert int(record["kv_bytes"]) == num_blocks * 2 * 4 * 16


def test_mixed_loops_give_the_tokens_of_the_monolithic_one(private_redis_server, monolithic_answers):
    with toy(private_redis_server) as running:
        running.start("mixed")
        running.start("mixed")
        assert finish(running.start_asking()) == monolithic_answers


def test_killed_decode_loop_loses_and_doubles_no_token(private_redis_server, monolithic_answers):
    with toy(private_redis_server) as running:
        running.start("prefill")
        doomed, other = running.start("decode"), running.start("decode")
        asking = running.start_asking()

        def is_caught_decoding() -> bool:
            process = running.processes[doomed]
            if running.holds(doomed, "decode"):
                process.send_signal(signal.SIGSTOP)
                if running.holds(doomed, "decode"):
                    return True
                process.send_signal(signal.SIGCONT)
            return False

        until(is_caught_decoding)
        killed = running.processes.pop(doomed)
        killed.kill()
        killed.communicate()
        assert finish(asking) == monolithic_answers
        again = [record for record in running.records() if record["attempts"] != "1"]
        assert again
        assert {record["decode"] for record in again} == {other}


def test_drained_decode_loop_ends_what_it_holds(private_redis_server, monolithic_answers):
    with toy(private_redis_server) as running:
        running.start("prefill")
        leaving, _ = running.start("decode"), running.start("decode")
        asking = running.start_asking()
        until(lambda: running.holds(leaving, "decode"))
        running.drain(leaving)
        assert finish(asking) == monolithic_answers
        records = running.records()
        assert {record["attempts"] for record in records} == {"1"}
        assert any(record["decode"] == leaving for record in records)


def test_front_end_streams_cancels_and_says_what_is_wrong(private_redis_server):
    with toy(private_redis_server) as running:
        running.start("mixed")
        for _ in range(2):
            text = output_of("ask.py", "tour", running.address)
            assert re.fullmatch(
                r"""streamed 8 tokens, finish reason FinishReason.LENGTH
cancelled: FinishReason.CANCELLED, seen enough
closed: its record says cancelled
duplicate: request id '\w+' was used before .*
invalid: priority is 'urgent': the classes here are interactive, default, batch
full: \d+ wait of 0 that may; try again in \d+ s
failed: failed, no decode instance has a KV pool that holds its 5000 input tokens
""",
                text,
            ), text


def test_many_requests_use_few_connections(private_redis_server, monolithic_answers):
    with toy(private_redis_server) as running:
        # Nobody answers yet, so that all are under way at once.
        before = running.redis.info("clients")["connected_clients"]
        asking = running.start_asking()
        until(lambda: len(running.records()) == 200)
        assert running.redis.info("clients")["connected_clients"] - before <= 3
        running.start("mixed")
        assert finish(asking) == monolithic_answers


def test_the_guides_diff_is_the_programs_diff():
    names = ("toy_loop.py", "toy_loop_pd.py")
    before, after = ((EXAMPLES / name).read_text(encoding="utf-8").splitlines(keepends=True) for name in names)
    shown = re.findall(r"^```diff\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert shown == ["".join(difflib.unified_diff(before, after, *names))]
