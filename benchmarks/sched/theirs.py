"""The baseline's side: zero-work nodes and fronts of polling_lists as child processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection as Pipe
from typing import Any

from benchmarks.baselines.polling_lists import Front, Node, Result
from benchmarks.sched.children import Address, serve_blocking
from benchmarks.sched.work import PROMPT, Load

ENGINE_POLL_S = 0.001
MAX_UNSENT = 64 * 32
LAST_TIMEOUT_S = 60.0


class ZeroWorkEngine:
    """Gives the first token of all prompts that came, or steps all sequences that it decodes; polls in between."""

    def __init__(self, node: Node, role: str) -> None:
        self.arrivals: dict[str, float] = {}
        self._node = node
        self._step = self._prefill if role == "prefill" else self._decode
        self._running: dict[str, tuple[int, int]] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped:
            requests = self._node.get_requests()
            if not requests and not self._running:
                time.sleep(ENGINE_POLL_S)
                continue
            self._step(requests)

    def _prefill(self, requests: list[Mapping[str, Any]]) -> None:
        now = time.monotonic()
        self.arrivals.update((r["id"], now) for r in requests)
        self._node.put_results([Result(r["id"], 0, 7, False) for r in requests])

    def _decode(self, requests: list[Mapping[str, Any]]) -> None:
        self._running.update({r["id"]: (1, r["max_tokens"] - 1) for r in requests})
        results = []
        for request_id, (index, last) in list(self._running.items()):
            results.append(Result(request_id, index, 8, index == last))
            if index == last:
                del self._running[request_id]
            else:
                self._running[request_id] = (index + 1, last)
        self._node.put_results(results)
        while self._node.num_unsent > MAX_UNSENT and not self._stopped:
            time.sleep(ENGINE_POLL_S)

    def take_arrivals(self) -> dict[str, float]:
        arrivals, self.arrivals = self.arrivals, {}
        return arrivals


def run_instance(pipe: Pipe, address: Address, role: str, name: str) -> None:
    node = Node(address, role, name)
    engine = ZeroWorkEngine(node, role)
    serve_blocking(pipe, {"arrivals": engine.take_arrivals})
    engine.stop()
    node.close()


class LoadGenerator:
    """Users of one front."""

    def __init__(self, address: Address) -> None:
        self._submitted: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._received: dict[str, int] = {}
        self._num_tokens = 0
        self._lock = threading.Lock()
        self._ended = threading.Semaphore(0)
        self._load = Load("", 0)
        self.front = Front(address, self._on_result)

    def run(self, load: Load) -> dict[str, Any]:
        """See the load generator of ours.py."""
        self._load, self._submitted, self._first, self._received, self._num_tokens = load, {}, {}, {}, 0
        started = time.perf_counter()
        for i, request_id in enumerate(load.ids()):
            if load.rate is not None:
                time.sleep(max(0.0, started + i / load.rate - time.perf_counter()))
            elif i >= load.window:
                self._await_end()
            self._submitted[request_id] = time.monotonic()
            self.front.put_request({"id": request_id, "prompt": PROMPT, "max_tokens": load.num_tokens})
        for _ in range(load.num_requests if load.rate is not None else min(load.window, load.num_requests)):
            self._await_end()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": self._num_tokens, "submitted": self._submitted, "first": self._first}

    def _await_end(self) -> None:
        if not self._ended.acquire(timeout=LAST_TIMEOUT_S):
            raise TimeoutError(f"no request ended within {LAST_TIMEOUT_S:g} s")

    def _on_result(self, result: Result) -> None:
        with self._lock:
            if result.index == 0:
                self._first[result.request_id] = time.monotonic()
            self._num_tokens += 1
            received = self._received.get(result.request_id, 0) + 1
            self._received[result.request_id] = received
        if received == self._load.num_tokens:
            self._ended.release()


def run_frontend(pipe: Pipe, address: Address) -> None:
    generator = LoadGenerator(address)
    serve_blocking(pipe, {"run": generator.run})
    generator.front.close()
