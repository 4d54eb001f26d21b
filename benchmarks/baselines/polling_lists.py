"""A P/D scheduler over Redis lists with polling, the way FastDeploy's SplitwiseScheduler is documented to work.

Written anew from that description, with its defaults: every node rewrites its entry of one registry HASH each 5 ms; a
front reads the whole registry for each request, draws a prefill and a decode node at random from those near the least
load, and pushes the request to each one's LIST; nodes pop; results go back in batches by MULTI, LPUSH, EXPIRE, EXEC
into a LIST a front, which it polls every 10 ms. Threads and the blocking client, four readers and four writers.
Engines ask for requests by polling. Requests and results travel as the JSON of their ``to_dict``.

Left out to its advantage: chunked-prefill admission, block budgets, results that overtake the first token (they hang
its request there), expiry of nodes.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import redis

from benchmarks.sched.children import Address

SYNC_PERIOD_S = 0.005
POLL_PERIOD_S = 0.01
READER_PARALLEL = WRITER_PARALLEL = 4
READER_BATCH = WRITER_BATCH = 200
MIN_LOAD_SCORE = 3
TTL_S = 900
NODE_SILENT_S = 3.0


@dataclass(frozen=True)
class Result:
    """One output token of a request; the last is ``finished``."""

    request_id: str
    index: int
    token_id: int
    finished: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "outputs": {"index": 0, "send_idx": self.index, "token_ids": [self.token_id], "text": None},
            "finished": self.finished,
            "metrics": {"arrival_time": time.time(), "first_token_time": None, "inference_start_time": None},
            "num_cached_tokens": 0,
            "error_code": 200,
            "error_msg": None,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Result:
        return cls(d["request_id"], d["outputs"]["send_idx"], d["outputs"]["token_ids"][0], d["finished"])


def _client(address: Address) -> redis.Redis:
    return redis.Redis(host=address.host, port=address.port)


class Front:
    """Schedules requests and collects results; ``on_result`` is called from its reader threads."""

    def __init__(self, address: Address, on_result: Callable[[Result], None]) -> None:
        self._topic = address.topic
        self._redis = _client(address)
        self._on_result = on_result
        self._group = f"{address.topic}:results:{random.getrandbits(64):x}"
        self._requests: deque[dict[str, Any]] = deque()
        self._have_requests = threading.Condition()
        self._stopped = False
        loops = [self._schedule_all, *[self._read_results] * READER_PARALLEL]
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def put_request(self, request: dict[str, Any]) -> None:
        with self._have_requests:
            self._requests.append(request)
            self._have_requests.notify()

    def close(self) -> None:
        self._stopped = True
        with self._have_requests:
            self._have_requests.notify()
        for thread in self._threads:
            thread.join()

    def _schedule_all(self) -> None:
        while True:
            with self._have_requests:
                while not self._requests and not self._stopped:
                    self._have_requests.wait()
                if self._stopped:
                    return
                request = self._requests.popleft()
            self._schedule(request)

    def _schedule(self, request: dict[str, Any]) -> None:
        nodes = self._redis.hgetall(f"{self._topic}:cluster")
        by_role: dict[str, list[tuple[int, str]]] = defaultdict(list)
        now = time.time()
        for name, packed in nodes.items():
            node = json.loads(packed)
            if now - node["at"] < NODE_SILENT_S:
                by_role[node["role"]].append((node["load"], name.decode()))
        prefill, decode = _near_least(by_role["prefill"]), _near_least(by_role["decode"])
        message = json.dumps({**request, "group": self._group, "prefill": prefill, "decode": decode})
        self._redis.lpush(f"{self._topic}:requests:{prefill}", message)
        self._redis.lpush(f"{self._topic}:requests:{decode}", message)

    def _read_results(self) -> None:
        while not self._stopped:
            rows = self._redis.rpop(self._group, READER_BATCH)
            if not rows:
                time.sleep(POLL_PERIOD_S)
                continue
            for row in rows:
                self._on_result(Result.from_dict(json.loads(row)))


def _near_least(nodes: Iterable[tuple[int, str]]) -> str:
    """One at random among those whose load is within the score of the least."""
    ranked = sorted(nodes)
    return random.choice([name for load, name in ranked if load <= ranked[0][0] + MIN_LOAD_SCORE])


class Node:
    """One instance, whose engine calls ``get_requests`` and ``put_results``."""

    def __init__(self, address: Address, role: str, name: str) -> None:
        self._topic, self._role, self._name = address.topic, role, name
        self._redis = _client(address)
        self._load = 0
        self._requests: deque[Mapping[str, Any]] = deque()
        self._lock = threading.Lock()
        self._groups: dict[str, tuple[str, int]] = {}
        self._results: deque[tuple[str, Result]] = deque()
        self._have_results = threading.Condition()
        self._stopped = False
        self._report()
        loops = [self._report_all, self._pop_all, *[self._write_results] * WRITER_PARALLEL]
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def get_requests(self, batch: int = READER_BATCH) -> list[Mapping[str, Any]]:
        """At most ``batch`` requests that have come; never waits."""
        return [self._requests.popleft() for _ in range(min(batch, len(self._requests)))]

    def put_results(self, results: Iterable[Result]) -> None:
        rows = []
        with self._lock:
            for result in results:
                group, cost = self._groups[result.request_id]
                rows.append((group, result))
                if result.finished or self._role == "prefill":
                    self._load -= cost
                    del self._groups[result.request_id]
        with self._have_results:
            self._results.extend(rows)
            self._have_results.notify()

    @property
    def num_unsent(self) -> int:
        return len(self._results)

    def close(self) -> None:
        self._stopped = True
        with self._have_results:
            self._have_results.notify_all()
        for thread in self._threads:
            thread.join()
        self._redis.hdel(f"{self._topic}:cluster", self._name)

    def _report(self) -> None:
        entry = json.dumps({"role": self._role, "load": self._load, "at": time.time(), "host": "127.0.0.1"})
        self._redis.hset(f"{self._topic}:cluster", self._name, entry)

    def _report_all(self) -> None:
        while not self._stopped:
            self._report()
            time.sleep(SYNC_PERIOD_S)

    def _pop_all(self) -> None:
        key = f"{self._topic}:requests:{self._name}"
        while not self._stopped:
            first = self._redis.brpop([key], timeout=1)
            if first is None:
                continue
            more = self._redis.rpop(key, READER_BATCH - 1) or []
            requests = [json.loads(row) for row in (first[1], *more)]
            with self._lock:
                for request in requests:
                    # Load of prefill: prompt tokens; of decode: requests.
                    cost = len(request["prompt"]) if self._role == "prefill" else 1
                    self._groups[request["id"]] = (request["group"], cost)
                    self._load += cost
            self._requests.extend(requests)

    def _write_results(self) -> None:
        while True:
            with self._have_results:
                while not self._results and not self._stopped:
                    self._have_results.wait()
                if self._stopped:
                    return
                taken = [self._results.popleft() for _ in range(min(WRITER_BATCH, len(self._results)))]
            by_group: dict[str, list[bytes]] = defaultdict(list)
            for group, result in taken:
                by_group[group].append(json.dumps(result.to_dict()).encode())
            for group, rows in by_group.items():
                with self._redis.pipeline(transaction=True) as pipe:
                    pipe.lpush(group, *rows)
                    pipe.expire(group, TTL_S)
                    pipe.execute()
