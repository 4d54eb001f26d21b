"""Plain ``vllm serve`` under this scheduler, an agent beside each, and the ``openai`` client at the gateway.

Two servers, and a mixed instance with vLLM in our own process, so that both kinds form pairs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from engine.demo.fleet import Fleet, free_port
from splitwise_sched.errors import StoreUnavailable
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import InstanceRecord
from splitwise_sched.types import Request, SamplingParams
from tests.e2e.reference import generate
from tests.engine_drivers import random_prompt
from tests.sharing import Shared
from tests.vllm.engines import BLOCK_SIZE
from tests.vllm.serving import PATIENCE, READY_S, VllmServe

IN_PROCESS = (
    "--engine", "vllm", "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "1024",
    "--max-num-batched-tokens", "128", "--block-size", str(BLOCK_SIZE), "--engine-args", '{"enforce_eager": true}',
)  # fmt: skip
LENGTHS = (5, 17, 31, 32, 33, 40, 63, 64, 65, 96, 100, 127, 128, 129, 150, 200, 256, 300, 333, 400, 500, 512, 640, 700)
ROUND_TRIPS = 5
KILL_S = 180.0
NUM_INSTANCES = 3


def requests_of(name: str, num_output: int) -> list[Request]:
    """One of each length; other prompts for each name."""
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    return [
        Request(f"{name}-{i}", "tiny", random_prompt(length, seed=hash_of(name)), sampling)
        for i, length in enumerate(LENGTHS)
    ]


def hash_of(name: str) -> int:
    return sum(name.encode())


WHOLE, STREAMED = requests_of("whole", 24), requests_of("streamed", 24)
AGAIN = {
    role: [Request(f"again-{role}-{i}", r.model, r.prompt_token_ids, r.sampling) for i, r in enumerate(WHOLE)]
    for role in ("prefill", "decode")
}
# Long ones first: they are computed and moved chunk by chunk while the others wait.
KILLS = {name: requests_of(name, 100)[::-1] for name in ("prefill", "decode", "agent")}
# Nobody else's: a cache that was filled with wrong KV stays wrong.
CONTROL = (requests_of("swapped", 24)[-3], requests_of("control", 24)[-3])


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    """By transformers: the engines are to agree."""
    return generate(model, [*WHOLE, *STREAMED, *CONTROL, *(r for requests in KILLS.values() for r in requests)])


class Deployment:
    """
    Attributes:
        servers: by the name of the instance that they are.
    """

    def __init__(self, fleet: Fleet, servers: Mapping[str, VllmServe], gateway: str) -> None:
        self.fleet, self.servers = fleet, servers
        self.gateway = gateway

    @asynccontextmanager
    async def frontend(self) -> AsyncIterator[FrontEnd]:
        """For a look at the records."""
        settings = self.fleet.settings.model_copy(update={"redis_timeout_s": 60.0})
        while True:
            frontend = FrontEnd(settings)
            try:
                await frontend.start()
                break
            except StoreUnavailable:
                await asyncio.sleep(1)
        try:
            yield frontend
        finally:
            await frontend.close()

    async def all_live(self, frontend: FrontEnd) -> dict[str, InstanceRecord]:
        """By name, when all instances have their leases."""
        deadline = asyncio.get_running_loop().time() + READY_S
        while len(records := await frontend.store.live_instances()) < NUM_INSTANCES:
            self.fleet.check()
            assert asyncio.get_running_loop().time() < deadline, f"only {records} came"
            await asyncio.sleep(0.2)
        return {record.name: record for record in records}

    async def ready(self) -> None:
        async with self.frontend() as frontend:
            await self.all_live(frontend)
        await self.fleet.wait_for_gateway(int(self.gateway.rpartition(":")[2]))


@contextmanager
def deployed(model: Path, logs: Path) -> Iterator[Deployment]:
    port = free_port()
    with Fleet() as fleet, ExitStack() as stack:
        servers = {
            name: stack.enter_context(closing(VllmServe(name, model, logs))) for name in ("prefill-0", "decode-0")
        }
        for name, server in servers.items():
            role = name.partition("-")[0]
            flags = ("--vllm-url", server.url, "--splitwise-role", role, "--instance-name", name, *PATIENCE)
            fleet.start(name, ("attach", *flags))
        mixed = ("--model", str(model), "--splitwise-role", "mixed", "--instance-name", "mixed-0")
        fleet.start("mixed-0", ("serve", *mixed, *IN_PROCESS, *PATIENCE))
        fleet.start("gateway", ("gateway", "--port", str(port), *PATIENCE))
        for server in servers.values():
            server.wait_ready()
        deployment = Deployment(fleet, servers, f"http://127.0.0.1:{port}")
        with ThreadPoolExecutor(1) as beside:
            beside.submit(asyncio.run, deployment.ready()).result()
        yield deployment


@pytest.fixture(scope="module")
def deployments(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared[Deployment]]:
    with Shared(lambda: deployed(model, tmp_path_factory.mktemp("logs"))) as shared:
        yield shared


@pytest.fixture
def deployment(deployments: Shared[Deployment], request: pytest.FixtureRequest) -> Iterator[Deployment]:
    yield from deployments.lend(request)


@pytest.fixture
async def frontend(deployment: Deployment) -> AsyncIterator[FrontEnd]:
    async with deployment.frontend() as frontend:
        yield frontend


@pytest.fixture
async def client(deployment: Deployment) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"{deployment.gateway}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=240, max_retries=0) as client:
        yield client


class Stream:
    """A request's answer as it comes."""

    def __init__(self, client: openai.AsyncOpenAI, request: Request) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.task = asyncio.create_task(self._read(client))

    async def _read(self, client: openai.AsyncOpenAI) -> list[int]:
        async for chunk in await ask(client, self.request, stream=True):
            for choice in chunk.choices:
                self.token_ids += getattr(choice, "token_ids", None) or []
        return self.token_ids


async def ask(client: openai.AsyncOpenAI, request: Request, *, stream: bool) -> Any:
    return await client.completions.create(
        model="tiny", prompt=list(request.prompt_token_ids), max_tokens=request.sampling.max_tokens, temperature=0,
        stream=stream, extra_body={"ignore_eos": True, "return_token_ids": True},
        extra_headers={"X-Request-Id": request.request_id},
    )  # fmt: skip


async def answers_of(streams: Sequence[Stream]) -> dict[str, list[int]]:
    got = await asyncio.wait_for(asyncio.gather(*(s.task for s in streams)), 240)
    return {s.request.request_id: tokens for s, tokens in zip(streams, got, strict=True)}


def of(requests: Sequence[Request], expected: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {r.request_id: expected[r.request_id] for r in requests}


async def test_whole_and_streamed_answers_are_those_of_one_engine_and_decode_computed_none_of_the_prompts(
    deployment, frontend, client, expected
):
    whole = await asyncio.gather(*(ask(client, r, stream=False) for r in WHOLE))
    assert {r.request_id: list(a.choices[0].token_ids) for r, a in zip(WHOLE, whole, strict=True)} == of(
        WHOLE, expected
    )
    assert await answers_of([Stream(client, r) for r in STREAMED]) == of(STREAMED, expected)
    records = {r: await frontend.request_record(r.request_id) for r in (*WHOLE, *STREAMED)}
    assert {(r["state"], r["attempts"]) for r in records.values()} == {("done", "1")}
    assert ("prefill-0", "decode-0") in pairs_of(records.values())
    decode = deployment.servers["decode-0"]
    decoded = [q for q, r in records.items() if r["decode"].startswith("decode-0")]
    num_tokens = sum(len(q.prompt_token_ids) for q in decoded)
    assert decode.metric("vllm:external_prefix_cache_hits_total") > 0.9 * num_tokens
    assert decode.metric("vllm:splitwise_kv_loads_total") == len(decoded)
    assert decode.metric("vllm:splitwise_kv_loads_failed_total") == 0
    assert not any("kv_load_failed" in r for r in records.values())


async def test_the_kv_of_another_prompt_gives_other_tokens(deployment, expected):
    """The tokens above came of the KV that was moved: with the wrong one they are wrong."""
    right, wrong = CONTROL
    async with httpx.AsyncClient(timeout=120) as client:

        async def complete(name: str, request: Request, **body: Any) -> Any:
            url = f"{deployment.servers[name].url}/v1/completions"
            common = {"model": "tiny", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            answer = await client.post(url, json={**common, "prompt": list(request.prompt_token_ids), **body})
            return answer.json()

        def send(request: Request) -> Any:
            return complete("prefill-0", request, max_tokens=1, kv_transfer_params={"do_remote_decode": True})

        def receive(request: Request, sent: Any) -> Any:
            return complete("decode-0", request, max_tokens=24, kv_transfer_params=sent["kv_transfer_params"])

        swapped = await receive(right, await send(wrong))
        assert swapped["choices"][0]["token_ids"] != expected[right.request_id]
        straight = await receive(wrong, await send(wrong))
        assert straight["choices"][0]["token_ids"] == expected[wrong.request_id]


async def kill_in_hand(
    frontend: FrontEnd,
    streams: Sequence[Stream],
    name: str,
    processes: Callable[[], list[psutil.Process]],
) -> None:
    """Kill these processes when the instance has a request in hand: its prompt under way, or its answer half out."""
    role = name.partition("-")[0]

    async def is_in_hand(stream: Stream) -> bool:
        record = await frontend.request_record(stream.request.request_id)
        is_under_way = len(stream.token_ids) > 10 if role == "decode" else not stream.token_ids
        return is_under_way and record.get("state") == role and record[role].startswith(name)

    async def caught() -> bool:
        found = await asyncio.gather(*map(is_in_hand, streams))
        for stream in [s for s, is_one in zip(streams, found, strict=True) if is_one]:
            tree = processes()
            for process in tree:
                process.suspend()
            # What was said until then, Redis reads first: that may be the request's end.
            held = [await is_in_hand(stream) for _ in range(ROUND_TRIPS)]
            for process in tree:
                if held[-1]:
                    process.kill()
                else:
                    process.resume()
            if held[-1]:
                return True
        return False

    async def poll() -> None:
        while not await caught():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), KILL_S)


def pairs_of(records: Iterable[Mapping[str, str]]) -> set[tuple[str, str]]:
    """Names of the instances that prefilled and decoded."""
    return {(r["prefill"].rpartition("-")[0], r["decode"].rpartition("-")[0]) for r in records}


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
async def test_a_killed_server_costs_no_request_and_no_token_and_is_back_when_it_is_started_again(
    deployment, frontend, client, expected, name
):
    role, server = name.partition("-")[0], deployment.servers[name]
    requests = KILLS[role]
    before = (await deployment.all_live(frontend))[name]
    streams = [Stream(client, r) for r in requests]
    await kill_in_hand(frontend, streams, name, server.processes)
    server.kill()
    assert await answers_of(streams) == of(requests, expected)
    records = [await frontend.request_record(r.request_id) for r in requests]
    assert {r["state"] for r in records} == {"done"}
    assert any(int(r["attempts"]) > 1 and name in r["history"] for r in records), records
    if role == "decode":
        assert ("prefill-0", "mixed-0") in pairs_of(records)
    server.restart()
    await asyncio.to_thread(server.wait_ready)
    after = (await deployment.all_live(frontend))[name]
    assert after.instance_id != before.instance_id
    assert after.fields["kv_endpoints"] != before.fields["kv_endpoints"]
    again = await answers_of([Stream(client, r) for r in AGAIN[role]])
    assert list(again.values()) == [expected[r.request_id] for r in WHOLE]


async def test_a_killed_agent_costs_no_request_and_no_token_and_its_server_drops_what_it_ran(
    deployment, frontend, client, expected
):
    fleet, server = deployment.fleet, deployment.servers["decode-0"]
    await deployment.all_live(frontend)
    streams = [Stream(client, r) for r in KILLS["agent"]]
    agent = psutil.Process(fleet.members["decode-0"].process.pid)
    await kill_in_hand(frontend, streams, "decode-0", lambda: [agent])
    fleet.kill("decode-0")

    while await asyncio.to_thread(server.metric, "vllm:num_requests_running"):  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    assert await answers_of(streams) == of(KILLS["agent"], expected)
    records = [await frontend.request_record(r.request_id) for r in KILLS["agent"]]
    assert any(int(r["attempts"]) > 1 and "decode-0" in r["history"] for r in records), records
    fleet.restart("decode-0")
    await deployment.all_live(frontend)
    fleet.check()
