"""What cannot work ends ``serve`` with one paragraph that names value and remedy, and leaves others running."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.demo.fleet import Fleet
from engine.testing import make_tiny_model
from kv_transfer.transports.registry import installed_transports
from splitwise_sched.frontend import FrontEnd
from tests.e2e.reference import generate
from tests.engine_drivers import greedy, random_prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def serve(*arguments: object) -> tuple[int, str]:
    """Exit code and all that was printed."""
    command = [sys.executable, "-m", "splitwise_sched", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def test_port_in_use(model, taken_port):
    code, said = serve("--model", model, "--port", taken_port)
    assert code == 2 and f"cannot listen on 127.0.0.1:{taken_port} (Address already in use)" in said
    assert "give another --port" in said


def test_redis_that_does_not_answer_is_told_before_the_model_is_loaded(model):
    code, said = serve("--model", model, "--scheduler-host", "127.0.0.1", "--scheduler-port", 1)
    assert code == 1 and "no Redis or Valkey answers at 127.0.0.1:1" in said and "loading" not in said


def test_transport_that_is_not_there(model, redis_server):
    code, said = serve(
        "--model", model, "--cache-transfer-protocol", "warp",
        "--scheduler-host", redis_server.host, "--scheduler-port", redis_server.port,
    )  # fmt: skip
    installed = ", ".join(installed_transports())
    assert code != 0 and f"'warp' is not installed; installed are: {installed}" in said and "loading" not in said


async def test_instance_with_another_kv_layout_is_refused_and_the_others_go_on(model):
    request = greedy(random_prompt(40), 64)
    with Fleet() as fleet:
        fleet.start_instance("mixed", 0, model, ("--served-model-name", "tiny", "--num-gpu-blocks-override", "100"))
        await fleet.wait_for_instances(1)
        async with FrontEnd(fleet.settings) as frontend:
            stream = await frontend.submit(request)
            scheduler = ("--scheduler-host", fleet.redis.host, "--scheduler-port", fleet.redis.port)
            code, said = await asyncio.to_thread(
                serve, "--model", model, "--served-model-name", "tiny", "--dtype", "bfloat16",
                "--scheduler-topic", "demo", "--num-gpu-blocks-override", 100, *scheduler,
            )  # fmt: skip
            tokens = [token async for output in stream for token in output.token_ids]
        fleet.check()
    assert code == 2
    assert (
        "this instance has kv.dtype 'bfloat16', but mixed-0-" in said
        and "has 'float32'" in said
        and "--scheduler-topic" in said
    )
    assert tokens == generate(model, [request])[request.request_id]
