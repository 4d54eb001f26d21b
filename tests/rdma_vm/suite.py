"""Runs every test of the RDMA transport on Soft-RoCE devices: ``python -m tests.rdma_vm.suite [pytest's arguments]``

The tests are shared out over several VMs, two of which run at a time, each for RDMA_VM_TIMEOUT_S (590) at most. Exit
codes are pytest's, the worst of all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.testing import make_tiny_model

SHARES = {
    "demo": ("tests/e2e/test_demo_rdma.py",),
    "devices": (
        "tests/integration/test_rdma.py",
        "tests/integration/test_kv_faults.py",
        "tests/integration/test_kv_lifetime.py",
    ),
    "layouts": ("tests/integration/test_kv_conformance.py",),
    "writes": (
        "tests/integration/test_rdma.py",
        "tests/integration/test_kv_faults.py",
        "tests/integration/test_kv_lifetime.py",
        "tests/integration/test_kv_conformance.py",
    ),
}
# Which of their tests. Write mode has a share of its own, without what is the same in both modes.
READS = "rdma and not rdma_write"
SELECTED = {
    "writes": "rdma_write and not (thousands or crc32 or falls_silent or taken_for_gone or longer_than or not_sent)",
}
NUM_VMS = 2
NUM_NICS, MEMORY_MIB = 8, 3072
TIMEOUT_S = int(os.environ.get("RDMA_VM_TIMEOUT_S", "590"))
NO_TESTS = 5
_printing = threading.Lock()


def has_tests(share: str, arguments: Sequence[str]) -> bool:
    """Whether pytest's arguments select any of a share, found out without a VM."""
    found = subprocess.run(
        [*_pytest(share, arguments), "--collect-only", "-q"],
        env={**os.environ, "RDMA_VM_NICS": str(NUM_NICS), "RDMA_VM_MODEL": "none"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    return found.returncode != NO_TESTS


def run(share: str, arguments: Sequence[str], model: Path, running: set[subprocess.Popen[str]]) -> int:
    """All tests of a share, in a VM; its output, each line after the share's name.

    Args:
        model: directory that the demo may serve.
        running: has the VM's process while it runs.
    """
    began = time.monotonic()
    # What the guest sees of this environment: a model that it need not make.
    environment = {**os.environ, "RDMA_VM_TIMEOUT_S": str(TIMEOUT_S), "RDMA_VM_MODEL": str(model)}
    machine = ("--nics", str(NUM_NICS), "--memory-mib", str(MEMORY_MIB), "--timeout-s", str(TIMEOUT_S))
    command = [sys.executable, "-m", "tests.rdma_vm.vm", *machine, "--", *_pytest(share, arguments)]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as vm:
        running.add(vm)
        assert vm.stdout is not None
        for line in vm.stdout:
            _say(share, line.rstrip())
    running.discard(vm)
    _say(share, f"exit code {vm.returncode} after {time.monotonic() - began:.0f} s")
    return vm.returncode


def main(arguments: Sequence[str]) -> int:
    # SIGTERM unwinds, so that the VMs end too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    running: set[subprocess.Popen[str]] = set()
    with TemporaryDirectory(prefix="rdma-vm-model-") as directory, ThreadPoolExecutor(NUM_VMS) as pool:
        try:
            selected = pool.map(lambda share: has_tests(share, arguments), SHARES)
            chosen = [share for share, has_some in zip(SHARES, selected, strict=True) if has_some]
            model = Path(directory, "llama")
            if "demo" in chosen:
                make_tiny_model("llama", model)
            codes = list(pool.map(lambda share: run(share, arguments, model, running), chosen))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for vm in list(running):
                vm.terminate()
            raise
    return max(codes, default=NO_TESTS)


def _pytest(share: str, arguments: Sequence[str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-k",
        SELECTED.get(share, READS),
        *SHARES[share],
        *arguments,
    ]


def _say(share: str, line: str) -> None:
    with _printing:
        print(f"{share:8}| {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
