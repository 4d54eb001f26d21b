"""What the server itself tells: its CPU time, who sends which commands, what scripts and requests cost it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from statistics import median
from threading import Thread
from typing import Any

import redis

from benchmarks.sched.children import Address
from benchmarks.sched.ours import registration_of, settings_at
from benchmarks.sched.work import NUM_PROMPT_TOKENS, PROMPT
from splitwise_sched.codec import encode_request
from splitwise_sched.store import Flow, Store
from splitwise_sched.types import Request, Role, SamplingParams

FOREVER_MS = 3_600_000
BIND_BATCH, BIND_ROUND = 16, 48
OUTPUT_COMMANDS = {"XADD", "XREAD", "LPUSH", "RPOP", "EXPIRE"}
OUTPUT_KEYS = (":out:", ":results:")


def cpu_s(client: redis.Redis) -> float:
    info: Any = client.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


class CommandCounter:
    """Counts what clients send, by name, between ``with`` and its end; what scripts call is not counted.

    Commands that write or read a stream or list of outputs count as "outputs".
    """

    def __init__(self, client: redis.Redis) -> None:
        self.counts: Counter[str] = Counter()
        self._client = client
        self._end = f"counted-{time.monotonic_ns()}"
        self._monitor = client.monitor()

    def __enter__(self) -> CommandCounter:
        self._monitor.__enter__()
        self._thread = Thread(target=self._count, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.echo(self._end)
        self._thread.join(30)
        self._monitor.__exit__(None, None, None)

    def _count(self) -> None:
        for command in self._monitor.listen():
            if self._end in command["command"]:
                return
            text = command["command"]
            name = text.split(" ", 1)[0].upper()
            if command["client_type"] == "lua" or name == "INFO":
                continue
            is_output = name in ("MULTI", "EXEC") or (
                name in OUTPUT_COMMANDS and any(key in text for key in OUTPUT_KEYS)
            )
            self.counts["outputs" if is_output else name] += 1


class _Topic:
    """A topic without processes: one registered prefill instance, and a front end's stream."""

    def __init__(self, address: Address, client: redis.Redis) -> None:
        self.store = Store(settings_at(address))
        self._client = client
        self._num_submitted = 0

    async def __aenter__(self) -> _Topic:
        await self.store.connect()
        await self.store.register("prefill", registration_of("prefill", Role.PREFILL), FOREVER_MS)
        await self.store.open_out("front", FOREVER_MS)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.store.close()

    async def submit(self, count: int) -> list[str]:
        ids = [f"request-{self._num_submitted + i}" for i in range(count)]
        self._num_submitted += count
        await asyncio.gather(*(self._submit(request_id) for request_id in ids))
        return ids

    async def _submit(self, request_id: str) -> None:
        sampling = SamplingParams(max_tokens=2, temperature=0.0)
        verdict, _ = await self.store.submit(
            request_id,
            encode_request(Request(request_id, "none", PROMPT, sampling)),
            frontend_id="front",
            nonce=f"{request_id}-nonce",
            timeout_ms=FOREVER_MS,
            retain_ms=1000,
            input_tokens=NUM_PROMPT_TOKENS,
            kv_tokens=NUM_PROMPT_TOKENS + 2,
            model="none",
            flow=Flow("standard", 1.0, "-"),
        )
        assert verdict == "QUEUED", verdict

    async def add_decodes(self, names: list[str]) -> None:
        """Register one, and copy its record: registering looks at all others, which is not what is measured here."""
        await self.store.register("decode", registration_of("decode", Role.DECODE), FOREVER_MS)
        keys = self.store.keys
        record: Any = self._client.hgetall(keys.instance("decode"))
        for start in range(0, len(names), 500):
            with self._client.pipeline(transaction=False) as pipe:
                for name in names[start : start + 500]:
                    pipe.hset(keys.instance(name), mapping=record)
                    pipe.zadd(keys.decode_load, {name: 0})
                pipe.execute()
        self._client.zrem(keys.decode_load, "decode")


async def bind_us(address: Address, client: redis.Redis, num_decodes: int, num_rounds: int) -> float:
    """Server time of bind for one request in a batch of 16, median over rounds, with so many decode instances live."""
    rounds = []
    async with _Topic(address, client) as topic, topic.store.reader() as reader:
        await topic.add_decodes([f"decode-{i}" for i in range(num_decodes)])
        for _ in range(num_rounds):
            await topic.submit(BIND_ROUND)
            claims = await reader.claim("prefill", BIND_ROUND, 1000)
            before = _script_us(client)
            bound = []
            for start in range(0, len(claims), BIND_BATCH):
                bound += await topic.store.bind("prefill", claims[start : start + BIND_BATCH], FOREVER_MS)
            rounds.append((_script_us(client) - before) / BIND_ROUND)
            assert all(b.verdict == "BOUND" for b in bound), bound
            for b in bound:
                topic.store.finish(b.request_id, 1, b.decode_instance, "1:0:1", retain_ms=1000, reason="length",
                                   notes={}, on_reply=_must_be_one)  # fmt: skip
            await topic.store.settle()
    return median(rounds)


def _must_be_one(reply: Any) -> None:
    assert reply == 1, reply


def _script_us(client: redis.Redis) -> float:
    stats: Any = client.info("commandstats")
    return float(stats["cmdstat_evalsha"]["usec"])


async def queued_bytes(address: Address, client: redis.Redis, count: int) -> tuple[float, float]:
    """Memory of one queued request in Redis: (beside its body, of its body)."""
    async with _Topic(address, client) as topic:
        # Buffers and tables that the first requests make are not theirs.
        await topic.submit(100)
        before: Any = client.info("memory")
        ids = await topic.submit(count)
        after: Any = client.info("memory")
        bodies = [client.memory_usage(topic.store.keys.body(i)) for i in ids[:: max(1, count // 50)]]
    body = sum(int(b or 0) for b in bodies) / len(bodies)
    return (after["used_memory"] - before["used_memory"]) / count - body, body
