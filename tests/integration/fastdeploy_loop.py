"""Engine loops written for FastDeploy's scheduler interface, with a toy model: a token is told by how many came before.

As a program (``python -m tests.integration.fastdeploy_loop '<JSON>'``) it is a node that serves until it is killed.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from typing import Any

from splitwise_sched.fastdeploy import (
    CompletionOutput,
    Request,
    RequestOutput,
    SplitWiseScheduler,
    SplitWiseSchedulerConfig,
)

BLOCK_SIZE = 16


def toy_token(first: int, num_before: int) -> int:
    return (first * 31 + num_before * 7) % 50_000


def toy_answer(prompt: list[int], max_tokens: int) -> list[int]:
    return [toy_token(prompt[0], len(prompt) + i) for i in range(max_tokens)]


def config_for(server: Any, topic: str, **more: Any) -> SplitWiseSchedulerConfig:
    return SplitWiseSchedulerConfig(host=server.host, port=server.port, topic=topic, **{"expire_period": 1000, **more})


def announced(role: str, host: str, port: int) -> dict[str, Any] | None:
    """What a node of this role tells about itself, in FastDeploy's shape."""
    if role == "mixed":
        return None
    return {
        "role": role,
        "transfer_protocol": ["ipc", "rdma"],
        "cache_info": {"ipc": {"ip": host, "port": port}, "rdma": {"ip": host, "port": port, "rdma_port": [port + 1]}},
    }


class EngineLoop:
    """One node's loop. Prefill hands each task to decode over ``wires`` (by the port that it is told), decode takes
    what comes on its own wire, and what ``get_requests`` gives when it is configured to.

    ``wires`` stands for FastDeploy's own connection between engines, which the scheduler has no part in.
    """

    def __init__(self, scheduler: SplitWiseScheduler, role: str, wires: dict[int, queue.Queue], port: int = 0) -> None:
        self.scheduler, self.role, self.wires = scheduler, role, wires
        self.wire: queue.Queue[Any] = wires.setdefault(port, queue.Queue())
        self.end, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.seen: list[Any] = []
        self.running: list[tuple[Any, int]] = []
        self.batch = 8
        self.step_s = 0.0
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> EngineLoop:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end.set()
        self.go.set()
        self.thread.join(10)

    def run(self) -> None:
        while not self.end.is_set():
            self.go.wait()
            tasks = self.scheduler.get_requests(
                available_blocks=1000,
                block_size=BLOCK_SIZE,
                reserved_output_blocks=2,
                max_num_batched_tokens=2048,
                batch=self.batch,
            )
            self.seen += tasks
            results = self.prefill(tasks) if self.role == "prefill" else self.decode(tasks)
            if results:
                self.scheduler.put_results(results)
            time.sleep(self.step_s if results else 0.001)

    def prefill(self, tasks: list[Any]) -> list[Any]:
        results = []
        for task in tasks:
            info = task.disaggregate_info
            wire = self.wires.get(info["cache_info"][info["transfer_protocol"]]["port"])
            if wire is not None:
                wire.put(task)
            results.append(self.result(task, 0, finished=True))
        return results

    def decode(self, tasks: list[Any]) -> list[Any]:
        first = 0 if self.role == "mixed" else 1
        self.running += [(task, first) for task in tasks]
        while not self.wire.empty():
            self.running.append((self.wire.get(), first))
        results, going_on = [], []
        for task, index in self.running:
            finished = index + 1 >= task.max_tokens
            results.append(self.result(task, index, finished=finished))
            if not finished:
                going_on.append((task, index + 1))
        self.running = going_on
        return results

    def result(self, task: Any, index: int, *, finished: bool) -> RequestOutput:
        token = toy_token(task.prompt_token_ids[0], len(task.prompt_token_ids) + index)
        metrics = {"arrival_time": time.time(), "by": self.role}
        return RequestOutput(task.request_id, CompletionOutput(0, index, [token]), finished, metrics=metrics)


def read_all(scheduler: SplitWiseScheduler, ids: list[str], timeout_s: float = 40.0) -> dict[str, list[Any]]:
    """All results of these requests, read as a server's loop reads them: again and again."""
    results: dict[str, list[Any]] = {user_id: [] for user_id in ids}
    deadline = time.monotonic() + timeout_s
    while not all(r and r[-1].finished for r in results.values()):
        assert time.monotonic() < deadline, [i for i, r in results.items() if not (r and r[-1].finished)]
        for user_id, more in scheduler.get_results().items():
            results[user_id] += more
        time.sleep(0.002)
    return results


def tokens_of(results: list[Any]) -> list[int]:
    assert [r.error_msg for r in results if r.error_code != 200] == []
    assert [r.outputs.send_idx for r in results] == list(range(len(results)))
    assert [r.finished for r in results] == [False] * (len(results) - 1) + [True]
    return [t for r in results for t in r.outputs.token_ids]


def request(user_id: str, max_tokens: int = 8, prompt: int = 20, **others: Any) -> Request:
    first = 1 + sum(map(ord, user_id)) % 997
    return Request(user_id, list(range(first, first + prompt)), max_tokens, prompt="words", others=others)


def main(options: dict[str, Any]) -> None:
    """A node of its own process: says its instance id once it serves, and then serves on.

    With ``is_mute`` it takes requests, says the id of each, and does nothing more.
    """
    role, step_s, is_mute = options.pop("role"), options.pop("step_s"), options.pop("is_mute")
    scheduler = SplitWiseScheduler(SplitWiseSchedulerConfig(**options, decode_gets_requests=True))
    scheduler.start(role, "10.0.0.1", announced(role, "10.0.0.1", 7000))
    loop = EngineLoop(scheduler, role, {})
    loop.step_s = step_s
    print(scheduler.infer.instance_id, flush=True)
    while is_mute:
        for task in scheduler.get_requests(1000, BLOCK_SIZE, 2, 2048, batch=4):
            print(task.request_id, flush=True)
        time.sleep(0.001)
    loop.run()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
