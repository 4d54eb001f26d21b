"""Clients that go away, servers that end, what is counted meanwhile, and the verb itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import httpx
import openai
import pytest

from splitwise_sched.errors import ConfigError
from splitwise_sched.store import Store
from tests.conftest import RedisServer
from tests.integration.gateway.parts import MODEL, ScriptedInstance, gateway
from tests.integration.toy import settings_for, until

pytest.importorskip("uvicorn")
COMPLETION = {"model": MODEL, "prompt": "x"}


async def counted(url: str, line: str) -> bool:
    async with httpx.AsyncClient() as client:
        return line in (await client.get(f"{url}/metrics")).text.splitlines()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_its_request(
    url: str, instance: ScriptedInstance, redis_server: RedisServer, topic: str, stream: bool
) -> None:
    instance.hold_after = 1
    request_id = f"{topic}-gone"
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        posting = asyncio.create_task(
            client.post("/v1/completions", json={**COMPLETION, "stream": stream}, headers={"X-Request-Id": request_id})
        )
        await until(lambda: instance.requests)
        posting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await posting
        dropped = await asyncio.wait_for(instance.dropped.get(), 15)
    assert dropped.request_id == request_id
    store = Store(settings_for(redis_server, topic))
    await store.connect()
    try:
        assert (await store.request_record(request_id))["state"] == "cancelled"
    finally:
        await store.close()
    line = 'splitwise_gateway_requests_total{outcome="cancelled",route="/v1/completions"} 1.0'
    await until(lambda: counted(url, line))
    await until(lambda: counted(url, "splitwise_gateway_in_flight 0.0"))


async def test_a_stream_that_is_closed_early_cancels_its_request(url: str, instance: ScriptedInstance) -> None:
    instance.hold_after = 2
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream = await client.completions.create(**COMPLETION, stream=True)
        await anext(stream)
        await stream.close()
        dropped = await asyncio.wait_for(instance.dropped.get(), 15)
    assert dropped.request_id == instance.requests[0].request_id


async def test_what_happened_is_counted(url: str, instance: ScriptedInstance) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        usage = (await client.post("/v1/completions", json=COMPLETION)).json()["usage"]
        await client.post("/v1/completions", json={**COMPLETION, "stream": True})
        await client.post("/v1/chat/completions", json={**COMPLETION, "model": "other"})
        lines = (await client.get("/metrics")).text.splitlines()
    for line in (
        'splitwise_gateway_requests_total{outcome="ok",route="/v1/completions"} 2.0',
        'splitwise_gateway_requests_total{outcome="invalid",route="/v1/chat/completions"} 1.0',
        f"splitwise_gateway_prompt_tokens_total {2.0 * usage['prompt_tokens']}",
        f"splitwise_gateway_output_tokens_total {2.0 * usage['completion_tokens']}",
        "splitwise_gateway_ttft_seconds_count 2.0",
        "splitwise_gateway_tpot_seconds_count 2.0",
        "splitwise_gateway_e2e_seconds_count 2.0",
        "splitwise_gateway_in_flight 0.0",
    ):
        assert line in lines


async def test_health_is_good_when_a_request_would_be_answered(url: str, topic: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        response = await client.get("/health")
    assert response.status_code == 200
    body = response.json()
    assert (body["status"], body["redis"], body["topic"]) == ("ok", "ok", topic)
    assert body["instances"] == {"prefill": 0, "decode": 0, "mixed": 1}


async def test_a_gateway_that_ends_lets_its_streams_finish(
    redis_server: RedisServer, topic: str, instance: ScriptedInstance
) -> None:
    instance.hold_after = 2
    async with contextlib.AsyncExitStack() as serving, httpx.AsyncClient(timeout=20) as client:
        url = await serving.enter_async_context(gateway(settings_for(redis_server, topic)))
        async with client.stream("POST", f"{url}/v1/completions", json={**COMPLETION, "stream": True}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            ending = asyncio.create_task(serving.aclose())
            await until(lambda: refuses_connections(url))
            assert not ending.done()
            instance.go_on.set()
            assert [line async for line in lines][-2:] == ["data: [DONE]", ""]
        await asyncio.wait_for(ending, 15)


async def refuses_connections(url: str) -> bool:
    try:
        async with httpx.AsyncClient() as client:
            await client.get(f"{url}/health")
    except httpx.ConnectError:
        return True
    return False


async def test_a_gateway_that_ends_cancels_what_does_not_finish_in_time(
    redis_server: RedisServer, topic: str, instance: ScriptedInstance
) -> None:
    instance.hold_after = 2
    async with httpx.AsyncClient(timeout=20) as client:
        async with gateway(settings_for(redis_server, topic), shutdown_timeout_s=0) as url:
            posting = asyncio.create_task(client.post(f"{url}/v1/completions", json=COMPLETION))
            await until(lambda: instance.requests)
        await asyncio.wait_for(instance.dropped.get(), 15)
        with contextlib.suppress(httpx.HTTPError):
            await posting


async def test_a_port_that_is_taken_is_named(redis_server: RedisServer, topic: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of '127.0.0.1' \(another program.*--port"):
            async with gateway(settings_for(redis_server, topic), port=port):
                raise AssertionError("it listens")


async def test_an_address_of_another_machine_is_named(redis_server: RedisServer, topic: str) -> None:
    with pytest.raises(ConfigError, match=r"'192\.0\.2\.1'.*--host"):
        async with gateway(settings_for(redis_server, topic), host="192.0.2.1"):
            raise AssertionError("it listens")


async def test_a_directory_without_tokenizer_is_named(redis_server: RedisServer, topic: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        async with gateway(settings_for(redis_server, topic), model=tmp_path):
            raise AssertionError("it listens")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_verb_serves_until_it_is_told_to_end(
    redis_server: RedisServer, topic: str, instance: ScriptedInstance, number: signal.Signals
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "splitwise_sched", "gateway", "--port", "0", "--scheduler-host", redis_server.host,
        "--scheduler-port", str(redis_server.port), "--scheduler-topic", topic,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        url = next(word for word in line.split() if word.startswith("http")).removesuffix("/v1;")
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
        process.send_signal(number)
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, out.decode(), err.decode()) == (0, "stopped\n", "")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_the_verb_tells_of_a_taken_port_in_a_paragraph(redis_server: RedisServer, topic: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "splitwise_sched", "gateway", "--port", str(taken.getsockname()[1]),
            "--scheduler-host", redis_server.host, "--scheduler-port", str(redis_server.port),
            "--scheduler-topic", topic, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, out) == (2, b"")
    assert err.startswith(b"error: cannot listen on port")
    assert err.count(b"\n") == 1
