"""The agent beside a ``vllm serve``: hand-over, failures of the server and of its answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from engine.settings import AttachSettings
from engine.vllm.attached import AttachedVllm, AttachOptions
from engine.vllm.parts import VllmFailed
from engine.vllm.server import VllmServer
from splitwise_sched.errors import ConfigError, IncompatibleInstance, RequestFailed
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import InstanceRecord
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Request, Role, SamplingParams
from tests.conftest import RedisServer
from tests.integration.toy import tokens_of, until
from tests.integration.vllm_server import (
    MODEL,
    SmallVllm,
    answer,
    chunk,
    event,
    other_layout,
    stream_of,
    tokens_after,
)

PROMPT = tuple(range(40, 90))
# So long that whatever ends sooner did not wait for a lease to lapse.
LONG_LEASE_S = 60.0


def request(max_tokens: int = 12, request_id: str = "r", **sampling: Any) -> Request:
    return Request(request_id, MODEL, PROMPT, SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling))


class Topic:
    """Agents and a front end of one topic; all end with the test."""

    def __init__(self, settings: SchedulerSettings, stack: AsyncExitStack, frontend: FrontEnd) -> None:
        self.settings, self.frontend = settings, frontend
        self._stack = stack

    async def attach(self, server: SmallVllm, role: str, name: str, **options: Any) -> AttachedVllm:
        made = AttachOptions(name, Role(role), **{"start_timeout_s": 20.0, **options})
        agent = AttachedVllm(self.settings, made, VllmServer(server.url, None))
        self._stack.push_async_callback(agent.close)
        await agent.start()
        return agent

    async def live(self) -> dict[str, InstanceRecord]:
        return {record.name: record for record in await self.frontend.store.live_instances()}

    async def until_there(self, name: str) -> InstanceRecord:
        async def record() -> InstanceRecord | None:
            return (await self.live()).get(name)

        found: InstanceRecord = await until(record)
        return found

    async def until_gone(self, name: str) -> None:
        async def is_gone() -> bool:
            return name not in await self.live()

        await until(is_gone)

    async def ask(self, asked: Request) -> list[int]:
        return await tokens_of(await self.frontend.submit(asked))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def topics(stack: AsyncExitStack, redis_server: RedisServer, topic: str) -> Callable[[float], Awaitable[Topic]]:
    async def make(lease_s: float = LONG_LEASE_S) -> Topic:
        settings = SchedulerSettings(
            scheduler_host=redis_server.host, scheduler_port=redis_server.port, scheduler_topic=topic,
            instance_lease_s=lease_s,
        )  # fmt: skip
        return Topic(settings, stack, await stack.enter_async_context(FrontEnd(settings)))

    return make


@pytest.fixture
def servers(stack: AsyncExitStack) -> Callable[..., Awaitable[SmallVllm]]:
    async def make(*args: Any, **kwargs: Any) -> SmallVllm:
        return await stack.enter_async_context(SmallVllm(*args, **kwargs))

    return make


# ---- what goes where -------------------------------------------------------------------------------------------------


async def test_prefill_and_decode_are_told_of_one_transfer_and_decode_of_prefills_ranks(topics, servers):
    topic, prefill, decode = await topics(), await servers(), await servers()
    await topic.attach(prefill, "prefill", "p")
    await topic.attach(decode, "decode", "d")
    assert await topic.ask(request(max_tokens=20)) == tokens_after(PROMPT, 20)
    (sent,) = prefill.of(transfer_id="r@1")
    (received,) = decode.of(transfer_id="r@1")
    assert sent["kv_transfer_params"]["do_remote_decode"] and sent["max_tokens"] == 1 and not sent["stream"]
    assert received["kv_transfer_params"] == {
        "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": "r@1", "remote_num_tokens": len(PROMPT),
        "remote_endpoints": prefill.endpoints, "remote_engine_id": None,
    }  # fmt: skip


async def test_the_lease_carries_the_servers_own_figures_and_address_and_loads_that_fail_are_counted(topics, servers):
    topic, server = await topics(1.0), await servers()
    server.num_loads_failed = 5
    agent = await topic.attach(server, "decode", "d")

    async def renewed() -> Any:
        return fields if "running" in (fields := (await topic.live())["d"].fields) else None

    fields = await until(renewed)
    assert (fields["running"], fields["waiting"], fields["kv_usage"]) == ("3", "2", "0.25")
    assert (fields["vllm"], fields["vllm_url"], fields["capacity_tokens"]) == ("0.32.0", server.url, "8000")
    assert agent.stats.num_recomputed == 0
    server.num_loads_failed = 7
    await until(lambda: agent.stats.num_recomputed == 2)


async def test_every_sampling_parameter_arrives_and_logprobs_come_back(topics, servers):
    topic, server = await topics(), await servers()
    await topic.attach(server, "mixed", "m")
    sampling = SamplingParams(
        max_tokens=3, temperature=0.7, top_p=0.8, top_k=11, seed=42, stop=("END",), stop_token_ids=(5, 6),
        ignore_eos=True, logprobs=2,
    )  # fmt: skip
    outputs = [o async for o in await topic.frontend.submit(Request("r", MODEL, PROMPT, sampling))]
    body = server.bodies[-1]
    assert body == body | {
        "model": MODEL, "prompt": list(PROMPT), "max_tokens": 3, "temperature": 0.7, "top_p": 0.8, "top_k": 11,
        "seed": 42, "stop": ["END"], "stop_token_ids": [5, 6], "ignore_eos": True, "logprobs": 2, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "request_id": "r@1",
        "return_token_ids": True, "return_tokens_as_token_ids": True, "stream": True,
    }  # fmt: skip
    assert "kv_transfer_params" not in body
    logprobs = [entry for output in outputs for entry in output.logprobs]
    assert [entry.token_id for entry in logprobs] == tokens_after(PROMPT, 3)
    assert all(e.logprob == -0.5 and e.top == ((e.token_id, -0.5), (7, -1.5), (8, -9999.0)) for e in logprobs)


async def test_a_request_that_is_cancelled_ends_in_the_server(topics, servers):
    topic, server = await topics(), await servers()
    await topic.attach(server, "mixed", "m")
    server.hold_after = 3
    stream = await topic.frontend.submit(request(max_tokens=1000))
    await until(lambda: len(stream.assembly.token_ids) == 3)
    await topic.frontend.cancel("r")
    await until(lambda: server.num_left == 1)


# ---- servers that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_requests_of_a_killed_server_go_on_elsewhere_at_once_and_it_comes_back_as_another(
    topics, servers, victim
):
    topic = await topics()
    small = {f"{role}-{i}": await servers() for role in ("prefill", "decode") for i in range(2)}
    for name, server in small.items():
        await topic.attach(server, name.partition("-")[0], name)
    dying, other = small[f"{victim}-0"], small[f"{victim}-1"]
    for server in (dying, other):
        if victim == "decode":
            server.hold_after = 5
        else:
            server.holds = True
    streams = [await topic.frontend.submit(request(max_tokens=20, request_id=f"r{i}")) for i in range(8)]
    answers = [asyncio.create_task(tokens_of(s)) for s in streams]
    await until(lambda: len(dying.of(transfer_id="r0@1")) + len(other.of(transfer_id="r0@1")) and dying.num_open > 0)
    if victim == "decode":
        await until(lambda: all(len(s.assembly.token_ids) == 5 for s in streams))
    before, num_other = dying.endpoints, len(other.bodies)
    await dying.kill()
    other.release()
    assert await asyncio.wait_for(asyncio.gather(*answers), 30) == [tokens_after(PROMPT, 20)] * 8
    assert len(other.bodies) > num_other
    await topic.until_gone(f"{victim}-0")
    dying.release()
    await dying.start()
    record = await topic.until_there(f"{victim}-0")
    assert record.fields["kv_endpoints"] == dying.endpoints != before
    assert await topic.ask(request(request_id="later")) == tokens_after(PROMPT, 12)


async def test_a_server_that_hangs_is_left_and_when_it_wakes_its_streams_are_ended(topics, servers):
    topic, stuck, well = await topics(1.0), await servers(), await servers()
    agent = await topic.attach(stuck, "mixed", "stuck")
    stuck.hold_after = 5
    stream = await topic.frontend.submit(request(max_tokens=1000))
    answer = asyncio.create_task(tokens_of(stream))
    await until(lambda: len(stream.assembly.token_ids) == 5)
    before = agent.instance_id
    stuck.holds = True
    await topic.attach(well, "mixed", "well")
    assert await asyncio.wait_for(answer, 30) == tokens_after(PROMPT, 1000)
    assert well.bodies[-1]["prompt"] == [*PROMPT, *tokens_after(PROMPT, 5)]
    await topic.until_gone("stuck")
    stuck.holds = False
    assert (await topic.until_there("stuck")).instance_id != before
    await until(lambda: stuck.num_left == 1)


async def test_a_server_that_is_slow_to_call_itself_well_stays_while_its_streams_go_on(topics, servers):
    topic, server = await topics(1.0), await servers()
    agent = await topic.attach(server, "mixed", "m")
    before = agent.instance_id
    server.hold_health()
    server.pause_s = 0.03
    assert await topic.ask(request(max_tokens=100)) == tokens_after(PROMPT, 100)
    assert agent.instance_id == before
    assert (await topic.frontend.request_record("r"))["attempts"] == "1"
    await topic.until_gone("m")


async def test_a_server_whose_runs_all_fail_leaves_though_it_calls_itself_well_until_one_succeeds(topics, servers):
    topic, bad, good = await topics(), await servers(), await servers()
    await topic.attach(bad, "mixed", "bad")
    bad.fault = lambda body: answer(500, {"error": {"message": "CUDA error", "code": 500}})
    streams = [await topic.frontend.submit(request(request_id=f"r{i}")) for i in range(3)]
    await topic.until_gone("bad")
    await topic.attach(good, "mixed", "good")
    assert [await tokens_of(s) for s in streams] == [tokens_after(PROMPT, 12)] * 3
    bad.fault = lambda body: None
    await topic.until_there("bad")


async def test_a_server_whose_engine_is_dead_leaves_and_one_that_is_busy_does_not(topics, servers):
    topic, server, other = await topics(), await servers(), await servers()
    agent = await topic.attach(server, "mixed", "m")
    num_busy = 0

    def busy(body: dict[str, Any]) -> bytes | None:
        nonlocal num_busy
        num_busy += 1
        return answer(503, {"error": {"message": "too many", "code": 503}}) if num_busy <= 4 else None

    server.fault = busy
    before = agent.instance_id
    assert await topic.ask(request()) == tokens_after(PROMPT, 12)
    assert (await topic.live())["m"].instance_id == before
    server.health = 503
    await topic.until_gone("m")
    await topic.attach(other, "mixed", "n")
    assert await topic.ask(request(request_id="later")) == tokens_after(PROMPT, 12)


def some(body: dict[str, Any]) -> bytes:
    """The first two tokens, which are right."""
    return event(chunk(body, 0, tokens_after(body["prompt"], 2)))


# What the server sends for the answer to ``body``; every one is to be run again.
BROKEN: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "no-json": lambda body: stream_of(event(b"{what")),
    "deep-json": lambda body: stream_of(event(b"[" * 100_000)),
    "no-object": lambda body: stream_of(event([1])),
    "no-choices": lambda body: stream_of(event({"choices": None})),
    "no-token-ids": lambda body: stream_of(event({"choices": [{"text": "x", "token_ids": None}]})),
    "strange-token-ids": lambda body: stream_of(event({"choices": [{"token_ids": ["7"]}]})),
    "negative-token-ids": lambda body: stream_of(event({"choices": [{"token_ids": [-7]}]})),
    "too-many-tokens": lambda body: stream_of(event({"choices": [{"token_ids": [7] * 13}]})),
    "huge-event": lambda body: stream_of(
        event(b" " * (2 << 20) + json.dumps(chunk(body, 0, tokens_after(PROMPT, 12))).encode())
    ),
    "an-error-event": lambda body: stream_of(some(body), event({"error": {"message": "x", "code": 400}})),
    "no-end": lambda body: stream_of(some(body), event(b"[DONE]")),
    "broken-off": lambda body: stream_of(some(body)),
    "an-abort": lambda body: stream_of(event({"choices": [{"token_ids": [], "finish_reason": "abort"}]})),
    "no-http": lambda body: b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": lambda body: b"",
    "moved": lambda body: answer(302, b""),
    "no-model": lambda body: answer(404, {"error": {"message": "no such model", "code": 404}}),
    "failed": lambda body: answer(500, b"x" * (1 << 20)),
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_an_answer_that_cannot_be_used_costs_a_run_and_no_token(topics, servers, kind):
    topic, server = await topics(), await servers()
    await topic.attach(server, "mixed", "m")
    faults = [BROKEN[kind]]
    server.fault = lambda body: faults.pop()(body) if faults else None
    assert await topic.ask(request()) == tokens_after(PROMPT, 12)
    record = await topic.frontend.request_record("r")
    assert (record["attempts"], record["state"]) == ("2", "done") and "vLLM" in record["history"], record


async def test_what_vllm_refuses_is_not_run_again(topics, servers):
    topic, server = await topics(), await servers()
    await topic.attach(server, "mixed", "m")
    server.fault = lambda body: answer(400, {"error": {"message": "token 5000 is out of vocabulary", "code": 400}})
    with pytest.raises(RequestFailed, match="token 5000 is out of vocabulary"):
        await topic.ask(request())
    assert len(server.of()) == 2  # the probe, and this


async def test_a_prefill_server_that_was_exchanged_unseen_is_told_by_its_answer(topics, servers):
    topic, prefill, decode = await topics(), await servers(), await servers()
    await topic.attach(prefill, "prefill", "p")
    await topic.attach(decode, "decode", "d")
    prefill.exchange()
    assert await topic.ask(request()) == tokens_after(PROMPT, 12)

    async def is_known() -> bool:
        record = (await topic.live()).get("p")
        return record is not None and record.fields["kv_endpoints"] == prefill.endpoints

    await until(is_known)


# ---- start and end ---------------------------------------------------------------------------------------------------


async def test_it_waits_for_a_server_that_is_not_there_yet_but_not_for_ever(topics, servers):
    topic, server = await topics(), await servers()
    await server.kill()
    with pytest.raises(VllmFailed, match=r"was not ready within 0\.5 s .*--vllm-url"):
        await topic.attach(server, "mixed", "early", start_timeout_s=0.5)
    attaching = asyncio.create_task(topic.attach(server, "mixed", "patient"))
    await server.start()
    await asyncio.wait_for(attaching, 30)
    assert await topic.ask(request()) == tokens_after(PROMPT, 12)


def _set(**fields: Any) -> Callable[[SmallVllm], None]:
    def change(server: SmallVllm) -> None:
        for name, value in fields.items():
            setattr(server, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(version={"version": "0.99.1"}), r"vLLM 0\.99\.1 .* supports 0\.32\.x"),
        (_set(version=answer(404, b"nginx")), r"--vllm-url http://127\.0\.0\.1:\d+ is no vLLM"),
        (_set(version=answer(200, b"[" * 9999)), "is no vLLM"),
        (_set(models={"data": []}), "/v1/models answers 200"),
        (_set(models={"data": [{"id": "other", "max_model_len": 9}]}), r"serves other: give one of these"),
        (_set(models={"data": [{"id": MODEL, "max_model_len": None}]}), "no model with a length"),
        (_set(num_engines=2), "2 data-parallel engines"),
        (_set(has_connector=False), "has no SplitwiseConnector: start it with --kv-transfer-config"),
        (_set(endpoints="[]"), "has a connector that this version does not know"),
        (_set(fault=lambda body: answer(400, {"error": {"message": "no"}})), "refuses a prompt of one token"),
        (_set(api_key="other"), r"refuses the API key \(401\): set SPLITWISE_VLLM_API_KEY"),
    ],
)
async def test_a_server_that_cannot_be_attached_is_refused_by_name_and_remedy(topics, servers, change, says):
    topic, server = await topics(), await servers()
    change(server)
    with pytest.raises(ConfigError, match=says):
        await topic.attach(server, "mixed", "m", served_model_name=MODEL)


async def test_servers_whose_kv_cannot_be_exchanged_are_not_put_together(topics, servers):
    topic, first, second = await topics(), await servers(), await servers(other_layout(dtype="bfloat16"))
    await topic.attach(first, "prefill", "p")
    with pytest.raises(IncompatibleInstance, match=r"kv\.dtype 'bfloat16', but p-"):
        await topic.attach(second, "decode", "d")


async def test_the_command_serves_with_a_key_that_it_never_tells_and_drains_on_sigterm(topics, servers):
    topic, server = await topics(), await servers(api_key="s3cret-key")
    settings = topic.settings
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "splitwise_sched", "attach", "--vllm-url", server.url, "--instance-name", "agent",
        "--scheduler-host", str(settings.scheduler_host), "--scheduler-port", str(settings.scheduler_port),
        "--scheduler-topic", settings.scheduler_topic, "--port", "0",
        env={**os.environ, "SPLITWISE_VLLM_API_KEY": "s3cret-key"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        await topic.until_there("agent")
        server.hold_after = 3
        stream = await topic.frontend.submit(request())
        answer = asyncio.create_task(tokens_of(stream))
        await until(lambda: len(stream.assembly.token_ids) == 3)
        process.send_signal(signal.SIGTERM)
        await until(lambda: _is_draining(topic))
        server.release()
        assert await asyncio.wait_for(answer, 30) == tokens_after(PROMPT, 12)
        said, _ = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said
    assert "mixed instance agent-" in said.decode() and f"vLLM at {server.url}" in said.decode()
    assert b"s3cret-key" not in said and b"HTTP Request" not in said
    assert b"0 requests that it held are back in the queue" in said


async def _is_draining(topic: Topic) -> bool:
    record = (await topic.live()).get("agent")
    return record is not None and record.fields.get("draining") == "1"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://127.0.0.1", "it is no http or https URL"),
        ("127.0.0.1:8001", "it is no http or https URL"),
        ("http://key@127.0.0.1:8001", "SPLITWISE_VLLM_API_KEY"),
        ("http://127.0.0.1:99999", "it is no URL"),
        ("http://127.0.0.1:8001/?key=1", "without a query"),
    ],
)
def test_an_address_that_is_none_is_refused(url, says):
    with pytest.raises(ValueError, match=says):
        AttachSettings(vllm_url=url)
