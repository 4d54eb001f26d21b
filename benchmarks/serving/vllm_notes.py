"""The connector as a benchmark has vLLM load it: it writes down when a transfer's blocks were ready, and when decode
computed with them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.serving.findings import Overlap
from engine.vllm.connector import SplitwiseConnector

DIRECTORY = "BENCHMARK_NOTES"


class NotingConnector(SplitwiseConnector):
    """One file of notes a connector, below ``DIRECTORY`` of the environment: what, transfer id, monotonic seconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file: TextIO | None = None
        self._receiving: dict[str, str] = {}

    def wait_for_save(self) -> None:
        now = time.monotonic()
        for blocks in self._get_connector_metadata().plan.send_blocks:
            self._note("last" if blocks.is_last else "ready", blocks.transfer_id, now)
        super().wait_for_save()

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._receiving[request.request_id] = request.kv_transfer_params["transfer_id"]
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        now = time.monotonic()
        for request_id in scheduler_output.num_scheduled_tokens:
            if (transfer_id := self._receiving.pop(request_id, None)) is not None:
                self._note("decoding", transfer_id, now)
        return super().build_connector_meta(scheduler_output)

    def _note(self, what: str, transfer_id: str, at: float) -> None:
        if self._file is None:
            self._file = (Path(os.environ[DIRECTORY]) / f"{os.getpid()}-{id(self)}").open("w", buffering=1)
        self._file.write(f"{what} {transfer_id} {at}\n")


def read_overlaps(directory: Path, request_ids: list[str]) -> list[Overlap]:
    """Of the first run of each request; its chunks are more than one."""
    seen: dict[tuple[str, str], float] = {}
    for line in (line for path in directory.iterdir() for line in path.read_text().splitlines()):
        what, transfer_id, at = line.split(" ")
        seen.setdefault((what, transfer_id), float(at))
    keys = [f"{request_id}@1" for request_id in request_ids]
    return [Overlap(seen["ready", key], seen["last", key], seen["decoding", key]) for key in keys]
