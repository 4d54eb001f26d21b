"""What the connector's hooks cost vLLM a step, and how much of a transfer vLLM's prefill hides.

A prefill and a decode engine in processes of their own, each wholly in one thread, so that a step's CPU time is that of
vLLM's scheduler, worker and model together.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import Report
from benchmarks.serving.findings import Overlap, report_hooks, report_overlap

START_TIMEOUT_S, ANSWER_TIMEOUT_S = 240.0, 120.0
LONG_PROMPT, NUM_LONG = 512, 5
SCHEDULER_HOOKS = ("get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
                   "update_connector_output", "request_finished_all_groups")  # fmt: skip
WORKER_HOOKS = ("handle_preemptions", "bind_connector_metadata", "start_load_kv", "wait_for_layer_load",
                "save_kv_layer", "wait_for_save", "get_transfer_results", "clear_connector_metadata")  # fmt: skip


class Engine:
    """One vLLM in a process of its own; ``with`` ends it."""

    def __init__(self, model: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._directory = tempfile.TemporaryDirectory(prefix="bench-vllm-")
        self._process = context.Process(target=_main, args=(theirs, str(model), self._directory.name), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._directory.cleanup()

    @property
    def endpoints(self) -> str:
        return (Path(self._directory.name) / "rank-0").read_text()

    def begin(self, *message: Any) -> None:
        self._pipe.send(message)

    def end(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        if not self._pipe.poll(timeout_s):
            raise SystemExit(f"vLLM did not answer within {timeout_s:g} s")
        return self._pipe.recv()

    def ask(self, *message: Any) -> Any:
        self.begin(*message)
        return self.end()


def measure(model: Path, count: int, report: Report) -> tuple[list[list[object]], list[list[object]]]:
    """Rows of two tables: median CPU time a step with and without transfers, and transfers of long prompts."""
    with Engine(model) as prefill, Engine(model) as decode:
        for engine in (prefill, decode):
            engine.end(START_TIMEOUT_S)
        hand_over(prefill, decode, [128] * 4, 4, "warm-up")
        for engine in (prefill, decode):
            engine.ask("medians_us")
        lengths = [32 + 37 * i % 225 for i in range(max(16, count))]
        hand_over(prefill, decode, lengths, 24, "hooks")
        figures = {"prefill, KV moves": prefill.ask("medians_us"), "decode, KV comes in": decode.ask("medians_us")}
        decode.ask("generate", [prompt_of(3, 0)], 200, [None])
        figures["decode, idle"] = decode.ask("medians_us")
        found = []
        for i in range(NUM_LONG):
            (name,) = hand_over(prefill, decode, [LONG_PROMPT], 2, f"long-{i}")
            (begin, prefilled), decoding = prefill.ask("sent", name), decode.ask("decoding", name)
            found.append(Overlap(begin, prefilled, decoding))
    return report_hooks("vllm", figures, report), report_overlap("vllm", found, report)


def hand_over(prefill: Engine, decode: Engine, lengths: Sequence[int], num_output: int, name: str) -> list[str]:
    """Decode asks while prefill computes, as under our scheduler. Returns the transfers' ids."""
    names = [f"{name}-{i}" for i in range(len(lengths))]
    prompts = [prompt_of(length, i + sum(map(ord, name))) for i, length in enumerate(lengths)]
    sends = [{"do_remote_decode": True, "transfer_id": n} for n in names]
    receives = [
        {
            "do_remote_prefill": True,
            "transfer_id": n,
            "remote_endpoints": prefill.endpoints,
            "remote_num_tokens": length,
        }
        for n, length in zip(names, lengths, strict=True)
    ]
    decode.begin("generate", prompts, num_output, receives)
    prefill.ask("generate", prompts, 1, sends)
    if any(count != num_output for count in decode.end()):
        raise SystemExit("vLLM gave fewer tokens than were asked for")
    return names


def prompt_of(length: int, seed: int) -> list[int]:
    return [3 + (7 * i + 131 * seed) % 997 for i in range(length)]


def _main(pipe: Connection, model: str, directory: str) -> None:
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    clock = _Clock()
    clock.install()
    from vllm import LLM

    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=1024,
        max_num_batched_tokens=128, max_num_seqs=16, enable_prefix_caching=False,
        kv_transfer_config={
            "kv_connector": "SplitwiseConnector",
            "kv_connector_module_path": "engine.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"protocols": "tcp", "endpoint_dir": directory},
        },
    )  # fmt: skip
    pipe.send("ready")
    while True:
        try:
            what, *arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_generate(llm, *arguments) if what == "generate" else getattr(clock, what)(*arguments))


def _generate(llm: Any, prompts: list[list[int]], max_tokens: int, transfers: list[Any]) -> list[int]:
    from vllm import SamplingParams

    sampling = [
        SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True,
                       extra_args=None if t is None else {"kv_transfer_params": t})
        for t in transfers
    ]  # fmt: skip
    results = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [len(r.outputs[0].token_ids) for r in results]


class _Clock:
    """CPU time of hooks and of whole steps that computed, and when transfers began and ended."""

    def __init__(self) -> None:
        self._hooks_s = 0.0
        self._depth = 0
        self._hook_s: list[float] = []
        self._step_s: list[float] = []
        self._begun: dict[str, float] = {}
        self._sent: dict[str, float] = {}
        self._received: dict[str, str] = {}
        self._decoding: dict[str, float] = {}

    def install(self) -> None:
        from vllm.v1.engine.core import EngineCore

        from engine.vllm.connector import SplitwiseConnector
        from engine.vllm.scheduler_side import SchedulerSide
        from engine.vllm.worker_side import WorkerSide

        for name in (*SCHEDULER_HOOKS, *WORKER_HOOKS):
            setattr(SplitwiseConnector, name, self._timed(getattr(SplitwiseConnector, name)))
        step, send, scheduled = EngineCore.step, WorkerSide._send, SplitwiseConnector.build_connector_meta
        allocated = SchedulerSide.allocated
        clock = self

        def timed_step(core: Any) -> Any:
            clock._hooks_s, start = 0.0, time.thread_time()
            result = step(core)
            if result[1]:
                clock._hook_s.append(clock._hooks_s)
                clock._step_s.append(time.thread_time() - start - clock._hooks_s)
            return result

        def noted_send(side: Any, blocks: Any) -> None:
            clock._begun.setdefault(blocks.transfer_id, time.monotonic())
            if blocks.is_last:
                clock._sent[blocks.transfer_id] = time.monotonic()
            send(side, blocks)

        def noted_allocated(side: Any, request_id: str, raw: Any, *rest: Any) -> None:
            clock._received[request_id] = raw["transfer_id"]
            allocated(side, request_id, raw, *rest)

        def noted_scheduled(connector: Any, output: Any) -> Any:
            for request_id in output.num_scheduled_tokens:
                if (name := clock._received.get(request_id)) is not None:
                    clock._decoding.setdefault(name, time.monotonic())
            return scheduled(connector, output)

        EngineCore.step = timed_step
        WorkerSide._send = noted_send  # type: ignore[method-assign]
        SchedulerSide.allocated = noted_allocated  # type: ignore[method-assign]
        SplitwiseConnector.build_connector_meta = noted_scheduled

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self._depth = time.thread_time(), self._depth + 1
            try:
                return hook(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._hooks_s += time.thread_time() - start

        return timed

    def medians_us(self) -> tuple[float, float]:
        """(hooks, the rest of a step), of what was measured since the last call."""
        found = tuple(1e6 * statistics.median(values or [0.0]) for values in (self._hook_s, self._step_s))
        self._hook_s.clear()
        self._step_s.clear()
        return found[0], found[1]

    def sent(self, transfer_id: str) -> tuple[float, float]:
        """When its first blocks were ready, and when its last ones were."""
        return self._begun[transfer_id], self._sent[transfer_id]

    def decoding(self, transfer_id: str) -> float:
        """When the first step that computes its request was planned."""
        return self._decoding[transfer_id]
