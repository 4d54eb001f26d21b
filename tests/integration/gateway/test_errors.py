"""What the gateway answers when something is wrong: status, OpenAI's error shape, and what to do about it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from splitwise_sched.types import Role
from tests.conftest import RedisServer
from tests.integration.gateway.parts import MAX_MODEL_LEN, MODEL, ScriptedInstance, gateway
from tests.integration.toy import settings_for, until

pytest.importorskip("uvicorn")
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": MODEL, "prompt": "x"}


@pytest.fixture
async def http(redis_server: RedisServer, topic: str, instance: ScriptedInstance) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        gateway(settings_for(redis_server, topic), max_body_bytes=100_000) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        yield client


def error_of(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    body = response.json()
    assert response.status_code == status, body
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("body", [b"{", b"[]", b"nonsense", b"\xff\xfe", b'{"model": NaN}', b"", b"[" * 50_000])
async def test_bodies_that_are_no_json_object(http: httpx.AsyncClient, path: str, body: bytes) -> None:
    error = error_of(await http.post(path, content=body), 400, "invalid_json")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("num_bytes", [100_001, 3_000_000, 70_000_000])
async def test_bodies_that_are_too_large(http: httpx.AsyncClient, num_bytes: int) -> None:
    try:
        response = await http.post("/v1/completions", content=b" " * num_bytes)
    except (httpx.WriteError, httpx.ReadError):
        assert num_bytes > 64 << 20  # what nobody would read is not waited for
        return
    error = error_of(response, 413, "body_too_large")
    assert "100000" in error["message"]


async def test_a_chunked_body_that_is_too_large(http: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    error_of(await http.post("/v1/completions", content=chunks()), 413, "body_too_large")


async def test_an_unknown_model_is_told_which_there_are(http: httpx.AsyncClient) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        error = error_of(await http.post(path, json={**body, "model": "gpt-9"}), 404, "model_not_found")
        assert "'gpt-9'" in error["message"]
        assert MODEL in error["message"]
    error_of(await http.get("/v1/models/gpt-9"), 404, "model_not_found")


async def test_a_prompt_longer_than_the_models_limit_is_told_the_numbers(http: httpx.AsyncClient) -> None:
    long = {**COMPLETION, "prompt": [1] * MAX_MODEL_LEN}
    error = error_of(await http.post("/v1/completions", json=long), 400, "context_length_exceeded")
    assert f"{MAX_MODEL_LEN} tokens" in error["message"]
    assert error["param"] == "prompt"
    asked = {**COMPLETION, "prompt": [1] * 990, "max_tokens": 11}
    error = error_of(await http.post("/v1/completions", json=asked), 400, "context_length_exceeded")
    assert "990 tokens" in error["message"]
    assert "at most 10" in error["message"]
    assert (await http.post("/v1/completions", json={**asked, "max_tokens": 10})).status_code == 200


async def test_an_open_limit_is_what_fits(http: httpx.AsyncClient, instance: ScriptedInstance) -> None:
    await http.post("/v1/completions", json={**COMPLETION, "prompt": [1] * 990})
    await http.post("/v1/completions", json={**COMPLETION, "prompt": [1] * 2})
    assert [request.sampling.max_tokens for request in instance.requests] == [10, 512]


async def test_a_request_id_is_used_once(http: httpx.AsyncClient, topic: str) -> None:
    headers = {"X-Request-Id": f"{topic}-once"}
    first = await http.post("/v1/completions", json=COMPLETION, headers=headers)
    assert first.json()["id"] == first.headers["x-request-id"] == f"{topic}-once"
    error = error_of(await http.post("/v1/completions", json=COMPLETION, headers=headers), 409, "duplicate_request_id")
    assert f"{topic}-once" in error["message"]


async def test_a_request_id_that_is_none_is_refused(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "a b#c"})
    error = error_of(response, 400)
    assert "'a b#c'" in error["message"]
    assert response.headers["x-request-id"] != "a b#c"


async def test_token_ids_outside_the_vocabulary_are_named(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post("/v1/completions", json={**COMPLETION, "prompt": [1, 10**9]}), 400)
    assert "prompt[1] is 1000000000" in error["message"]


async def test_routes_and_methods_that_there_are_not(http: httpx.AsyncClient) -> None:
    assert "/v1/embeddings" in error_of(await http.post("/v1/embeddings", json={}), 404)["message"]
    assert "POST" in error_of(await http.get("/v1/completions"), 405)["message"]


async def test_a_request_that_no_instance_can_do_is_told_why(
    http: httpx.AsyncClient, instance: ScriptedInstance
) -> None:
    instance.fails_with = "the pool has 3 blocks, it needs 9"
    error = error_of(await http.post("/v1/completions", json=COMPLETION), 500, "request_failed")
    assert "it needs 9" in error["message"]


async def test_an_error_in_mid_stream_is_an_event_and_the_end(
    http: httpx.AsyncClient, instance: ScriptedInstance, redis_server: RedisServer, topic: str
) -> None:
    instance.hold_after = 2
    async with gateway(settings_for(redis_server, topic), request_timeout_s=1.0) as url:
        async with httpx.AsyncClient(timeout=20) as client:
            response = await client.post(f"{url}/v1/completions", json={**COMPLETION, "stream": True})
            events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
            assert response.status_code == 200
            assert json.loads(events[0])["choices"][0]["text"]
            assert json.loads(events[-1])["error"]["code"] == "request_expired"
            error_of(await client.post(f"{url}/v1/completions", json=COMPLETION), 504, "request_expired")
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="expired"):
                async for _ in await client.completions.create(**COMPLETION, stream=True):
                    pass


async def test_a_full_queue_says_when_to_come_again(redis_server: RedisServer, topic: str, tokenizer_dir: Path) -> None:
    scheduler = settings_for(redis_server, topic, scheduler_max_size=2)
    async with (
        ScriptedInstance(scheduler, tokenizer_dir, room=0),
        gateway(scheduler, request_timeout_s=2.0) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
        client.stream("POST", "/v1/completions", json={**COMPLETION, "stream": True}),
        client.stream("POST", "/v1/completions", json={**COMPLETION, "stream": True}),
    ):
        response = await client.post("/v1/completions", json=COMPLETION)
        error = error_of(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        assert "2" in error["message"]
        assert "splitwise_gateway_queue_rejects_total 1.0" in (await client.get("/metrics")).text


async def test_without_instances_requests_are_told_to_wait(redis_server: RedisServer, topic: str) -> None:
    async with (
        gateway(settings_for(redis_server, topic)) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        response = await client.post("/v1/completions", json=COMPLETION)
        assert topic in error_of(response, 503, "no_instance")["message"]
        assert response.headers["retry-after"]
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": []}


async def test_a_request_that_meets_a_gap_between_two_instances_waits_for_the_next(
    redis_server: RedisServer, topic: str, tokenizer_dir: Path
) -> None:
    scheduler = settings_for(redis_server, topic, instance_lease_s=10)
    async with gateway(scheduler) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        async with ScriptedInstance(scheduler, tokenizer_dir):
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200

        async def is_gone() -> bool:
            return (await client.get("/health")).status_code == 503

        await until(is_gone)
        asking = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
        await asyncio.sleep(0.3)
        assert not asking.done()
        async with ScriptedInstance(scheduler, tokenizer_dir):
            assert (await asking).status_code == 200


async def test_a_kind_of_instance_that_is_missing_is_named(
    redis_server: RedisServer, topic: str, tokenizer_dir: Path
) -> None:
    scheduler = settings_for(redis_server, topic)
    async with (
        ScriptedInstance(scheduler, tokenizer_dir, role=Role.PREFILL),
        gateway(scheduler) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        error = error_of(await client.post("/v1/completions", json=COMPLETION), 503, "no_instance")
        assert "no decode instance" in error["message"]
        health = await client.get("/health")
        assert (health.status_code, health.json()["missing"]) == (503, ["decode"])


async def test_a_tokenizer_that_cannot_be_read_here_names_the_flag(
    redis_server: RedisServer, topic: str, tokenizer_dir: Path
) -> None:
    scheduler = settings_for(redis_server, topic)
    async with ScriptedInstance(scheduler, tokenizer_dir, names_tokenizer=False):
        async with gateway(scheduler) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
            error = error_of(await client.post("/v1/completions", json=COMPLETION), 503, "no_tokenizer")
            assert "--model PATH" in error["message"]
        async with gateway(scheduler, model=tokenizer_dir) as url, httpx.AsyncClient(base_url=url) as client:
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200


async def test_a_redis_that_has_gone_is_a_503(
    private_redis_server: RedisServer, topic: str, tokenizer_dir: Path
) -> None:
    scheduler = settings_for(private_redis_server, topic, redis_timeout_s=0.5)
    async with (
        ScriptedInstance(scheduler, tokenizer_dir),
        gateway(scheduler) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        assert (await client.get("/health")).status_code == 200
        private_redis_server.process.kill()
        private_redis_server.process.wait()
        response = await client.post("/v1/completions", json=COMPLETION)
        error_of(response, 503, "store_unavailable")
        assert response.headers["retry-after"]

        async def health_knows() -> bool:
            health = await client.get("/health")
            return health.status_code == 503 and health.json()["missing"] == ["redis"]

        await until(health_knows)


async def test_only_who_has_the_key_is_answered(redis_server: RedisServer, topic: str, tokenizer_dir: Path) -> None:
    scheduler = settings_for(redis_server, topic)
    async with (
        ScriptedInstance(scheduler, tokenizer_dir),
        gateway(scheduler, api_key="s3cret") as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Bearer é"},
        ):
            headers = {name: value.encode() for name, value in given.items()}
            error_of(await client.post("/v1/completions", json=COMPLETION, headers=headers), 401, "invalid_api_key")
            error_of(await client.get("/v1/models", headers=headers), 401, "invalid_api_key")
        right = {"Authorization": "Bearer s3cret"}
        assert (await client.post("/v1/completions", json=COMPLETION, headers=right)).status_code == 200
        assert (await client.get("/health")).status_code == 200
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError):
                await wrong.models.list()
