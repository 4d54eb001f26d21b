"""Plain ``vllm serve`` processes with the connector, which end with the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from engine.demo.fleet import free_port
from engine.vllm import lifetime
from splitwise_sched.embedded import die_with_parent
from tests.vllm.engines import BLOCK_SIZE

READY_S = 420.0
# Flags for several engines on a machine that may have two cores: whoever is silent for less is only slow.
PATIENCE = ("--instance-lease-s", "12", "--redis-timeout-s", "60")
CONNECTOR = {
    "kv_connector": "SplitwiseConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"protocols": "tcp", "checksum": "crc32", "silence_s": 15.0},
}
FLAGS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_SIZE),
    "--max-model-len", "1024", "--max-num-batched-tokens", "128", "--kv-transfer-config", json.dumps(CONNECTOR),
)  # fmt: skip


class VllmServe:
    """``close`` (or ``with``) ends it; ``wait_ready`` before anything is asked of it."""

    def __init__(self, name: str, model: Path, logs: Path, arguments: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = logs / name
        self._arguments = ("serve", str(model), "--port", str(self.port), *FLAGS, *arguments)
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        program = [
            sys.executable,
            die_with_parent.__file__,
            str(os.getpid()),
            sys.executable,
            "-m",
            "tests.vllm.vllm_cli",
        ]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*program, *self._arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, lifetime.VARIABLE: "1"},
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
        pytest.fail(f"vllm serve did not come up: {self._log.read_text(errors='replace')[-2000:]}")

    def processes(self) -> list[psutil.Process]:
        """Its own and all below it."""
        top = psutil.Process(self._process.pid)
        return [top, *top.children(recursive=True)]

    def metric(self, name: str) -> float:
        """Over all labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def kill(self) -> None:
        """With all its processes, as when its machine dies."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def kill_main(self) -> list[psutil.Process]:
        """That process alone; those that were below it."""
        top, *below = self.processes()
        top.kill()
        self._process.wait()
        return below

    def restart(self) -> None:
        """At the same address, after ``kill``."""
        self._process = self._started()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
