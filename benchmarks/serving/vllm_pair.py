"""What the connector's hooks cost vLLM a step.

A prefill and a decode engine in processes of their own, each wholly in one thread, so that a step's CPU time is that of
vLLM's scheduler, worker and model together. Under a server they are two processes, of which one waits in a loop: its
CPU time would make the hooks look small.
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
from benchmarks.serving.findings import report_hooks

START_TIMEOUT_S, ANSWER_TIMEOUT_S = 240.0, 120.0
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


def measure(model: Path, count: int, report: Report) -> list[list[object]]:
    """Rows of the table: median CPU time a step with and without transfers."""
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
    return report_hooks("vllm", figures, report)


def hand_over(prefill: Engine, decode: Engine, lengths: Sequence[int], num_output: int, name: str) -> None:
    """Decode asks while prefill computes, as under our scheduler."""
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
    """CPU time of hooks and of whole steps that computed."""

    def __init__(self) -> None:
        self._hooks_s = 0.0
        self._depth = 0
        self._hook_s: list[float] = []
        self._step_s: list[float] = []

    def install(self) -> None:
        from vllm.v1.engine.core import EngineCore

        from engine.vllm.connector import SplitwiseConnector

        for name in (*SCHEDULER_HOOKS, *WORKER_HOOKS):
            setattr(SplitwiseConnector, name, self._timed(getattr(SplitwiseConnector, name)))
        step, clock = EngineCore.step, self

        def timed_step(core: Any) -> Any:
            clock._hooks_s, start = 0.0, time.thread_time()
            result = step(core)
            if result[1]:
                clock._hook_s.append(clock._hooks_s)
                clock._step_s.append(time.thread_time() - start - clock._hooks_s)
            return result

        EngineCore.step = timed_step

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
