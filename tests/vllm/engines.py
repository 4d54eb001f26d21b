"""vLLM engines in processes of their own, driven over a pipe; what they moved can be looked at and damaged."""

from __future__ import annotations

import multiprocessing
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

BLOCK_SIZE = 32
START_TIMEOUT_S = 240.0
ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        transfer: ``kv_transfer_params`` that came with it.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    transfer: dict[str, Any] | None


class VllmEngine:
    """One engine; ``with`` ends it.

    Args:
        connector: whether it has the KV connector.
        tp_size: with 1, everything runs in the one process, so that ``blocks`` and ``damage`` reach the KV.
        engine_args: of vLLM's.
        extra: options of the connector.
    """

    def __init__(
        self,
        model: Path,
        *,
        connector: bool = True,
        tp_size: int = 1,
        policy: str = "recompute",
        engine_args: dict[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, str(model), connector, tp_size, policy, engine_args or {}, extra)
        self._process = context.Process(target=_main, args=arguments)
        self._process.start()
        theirs.close()

    def wait_ready(self) -> None:
        assert self._receive(START_TIMEOUT_S) == "ready"

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        transfers: Sequence[dict[str, Any] | None] | None = None,
    ) -> list[Answer]:
        """Greedy, all prompts at the same time."""
        return self._ask("generate", [list(p) for p in prompts], max_tokens, transfers or [None] * len(prompts))

    def blocks(self) -> dict[str, dict[tuple[int, int], int]]:
        """By transfer: checksum of each (layer, index of the block), when it was offered, or when it had come."""
        return self._ask("blocks")

    def damage(self, transfer_id: str, layer: int, index: int) -> None:
        """Zero one block of one layer of a transfer that was offered here."""
        self._ask("damage", transfer_id, layer, index)

    def kill(self) -> None:
        """With vLLM's processes below it, which do not notice that it is gone."""
        top = psutil.Process(self._process.pid)
        for process in [*top.children(recursive=True), top]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.is_alive():
            self.kill()
        self._pipe.close()

    def _ask(self, *message: Any) -> Any:
        self._pipe.send(message)
        return self._receive(ANSWER_TIMEOUT_S)

    def _receive(self, timeout_s: float) -> Any:
        assert self._pipe.poll(timeout_s), f"the engine did not answer within {timeout_s:g} s"
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def start(*engines: VllmEngine) -> None:
    """They load at the same time."""
    for engine in engines:
        engine.wait_ready()


def _main(  # noqa: PLR0917
    pipe: Connection,
    model: str,
    connector: bool,
    tp_size: int,
    policy: str,
    engine_args: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if tp_size == 1 else "1"
    from vllm import LLM

    config: dict[str, Any] = {}
    if connector:
        config["kv_transfer_config"] = {
            "kv_connector": "SplitwiseConnector",
            "kv_connector_module_path": "engine.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"protocols": "tcp", "checksum": "crc32", **extra},
        }
    recorder = _Recorder()
    if connector and tp_size == 1:
        recorder.install()
    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, block_size=BLOCK_SIZE, max_model_len=1024,
        max_num_batched_tokens=128, tensor_parallel_size=tp_size, **engine_args, **config,
    )  # fmt: skip
    pipe.send("ready")
    while True:
        what, *arguments = pipe.recv()
        try:
            answer = _generate(llm, *arguments) if what == "generate" else getattr(recorder, what)(*arguments)
        except Exception as exc:
            answer = exc
        pipe.send(answer)


def _generate(llm: Any, prompts: list[list[int]], max_tokens: int, transfers: list[Any]) -> list[Answer]:
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True,
            extra_args=None if t is None else {"kv_transfer_params": t},
        )
        for t in transfers
    ]  # fmt: skip
    results = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [
        Answer(tuple(r.outputs[0].token_ids), str(r.outputs[0].finish_reason), r.kv_transfer_params) for r in results
    ]


class _Recorder:
    """Looks over the connector's shoulder: which blocks of the pool each transfer had, and what was in them."""

    def __init__(self) -> None:
        self._offered: dict[str, list[int]] = {}
        self._wanted: dict[str, list[int]] = {}
        self._sums: dict[str, dict[tuple[int, int], int]] = {}
        self._tensors: list[Any] = []

    def install(self) -> None:
        from engine.vllm import connector, worker_side

        recorder = self
        register = connector.SplitwiseConnector.register_kv_caches
        send, receive = worker_side.WorkerSide._send, worker_side.WorkerSide._open_receive
        succeed = worker_side.WorkerSide._succeed

        def registered(self: Any, kv_caches: dict[str, Any]) -> None:
            recorder._tensors = list(kv_caches.values())
            register(self, kv_caches)

        def sent(self: Any, blocks: Any) -> None:
            ids = recorder._offered.setdefault(blocks.transfer_id, [])
            ids += blocks.block_ids
            recorder._look(blocks.transfer_id, blocks.first_index, blocks.block_ids)
            send(self, blocks)

        def opened(self: Any, asked: Any) -> None:
            recorder._wanted[asked.transfer_id] = list(asked.block_ids)
            receive(self, asked)

        def succeeded(self: Any, event: Any) -> None:
            if (ids := recorder._wanted.get(event.transfer_id)) is not None:
                recorder._look(event.transfer_id, 0, ids)
            succeed(self, event)

        connector.SplitwiseConnector.register_kv_caches = registered
        worker_side.WorkerSide._send = sent
        worker_side.WorkerSide._open_receive = opened
        worker_side.WorkerSide._succeed = succeeded

    def _look(self, transfer_id: str, first: int, block_ids: Sequence[int]) -> None:
        sums = self._sums.setdefault(transfer_id, {})
        for layer, tensor in enumerate(self._tensors):
            for index, block in enumerate(block_ids, first):
                if block >= 0:
                    sums[layer, index] = zlib.crc32(tensor[block].contiguous().numpy().tobytes())

    def blocks(self) -> dict[str, dict[tuple[int, int], int]]:
        return self._sums

    def damage(self, transfer_id: str, layer: int, index: int) -> None:
        self._tensors[layer][self._offered[transfer_id][index]].zero_()
