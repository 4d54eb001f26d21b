"""Runs every test of the RDMA transport on Soft-RoCE devices: ``python -m tests.rdma_vm.suite [pytest's arguments]``

The tests are shared out over several VMs, two of which run at a time; all of them together are given RDMA_VM_TIMEOUT_S
(590). The last lines say how many passed and failed, and which were not run. Exit codes: 1 when a test failed; 124 when
the time was up before all were run; 125 when a guest died; 126 when there is no image; 5 when no test was selected.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.rdma_vm.image import ImageUnavailable, ready_image
from tests.rdma_vm.outcomes import Outcomes, summary
from tests.rdma_vm.vm import EXIT_NO_IMAGE, EXIT_TIMEOUT

DEMO = "demo"
_DEVICES = (
    "tests/integration/test_rdma.py",
    "tests/integration/test_kv_faults.py",
    "tests/integration/test_kv_lifetime.py",
)
_LAYOUTS = ("tests/integration/test_kv_conformance.py",)
# Which of their tests: what is the same in both modes is run once, and checksums in one test of faults.
_READS = "rdma and not rdma_write and not (leave_nothing_behind and crc32)"
_WRITES = "rdma_write and not (thousands or crc32 or falls_silent or taken_for_gone or longer_than or not_sent)"
SHARES = {
    DEMO: ("rdma", ("tests/e2e/test_demo_rdma.py",)),
    "devices": (_READS, _DEVICES),
    "writes": (_WRITES, (*_DEVICES, *_LAYOUTS)),
    "layouts": (_READS, _LAYOUTS),
}
# Those that are not needed take ten seconds to import in the guest.
FEW_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
PACKAGES = ("engine", "kv_transfer", "splitwise_sched")
NUM_VMS = 2
NUM_NICS, MEMORY_MIB = 8, 3072
TIMEOUT_S = int(os.environ.get("RDMA_VM_TIMEOUT_S", "590"))
# Less is not worth a boot.
MIN_SHARE_S = 30.0
PYTEST_FAILED, NO_TESTS = 1, 5
_printing = threading.Lock()


@dataclass
class Share:
    """Tests that run in one VM, one after the other.

    Attributes:
        code: of the VM, once it has ended.
    """

    name: str
    arguments: Sequence[str]
    tests: Sequence[str]
    code: int = EXIT_TIMEOUT
    outcomes: Outcomes = field(init=False)

    def __post_init__(self) -> None:
        self.outcomes = Outcomes(self.tests)


def collect(name: str, arguments: Sequence[str]) -> Share:
    """The tests of a share that pytest's arguments select, found out without a VM.

    The guest, on its slow CPU, is spared the compilation of what is imported here.
    """
    found = subprocess.run(
        [*_pytest(name, arguments), "--collect-only", "-q"],
        env={**_compiling(), **FEW_PLUGINS, "RDMA_VM_NICS": str(NUM_NICS), "RDMA_VM_MODEL": "none"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if found.returncode not in (0, NO_TESTS):
        print(found.stdout, found.stderr, file=sys.stderr)
        raise SystemExit(found.returncode)
    return Share(name, arguments, [line for line in found.stdout.splitlines() if line.startswith("tests/")])


def run(share: Share, model: Path, until: float, running: set[subprocess.Popen[str]]) -> None:
    """All tests of a share, in a VM; its output, each line after the share's name.

    Args:
        model: GGUF file that the demo serves.
        until: when the VM is ended, in terms of the monotonic clock.
        running: has the VM's process while it runs.
    """
    began = time.monotonic()
    if (timeout_s := until - began) < MIN_SHARE_S:
        _say(share, "no time is left for it")
        return
    environment = {**os.environ, **FEW_PLUGINS, "RDMA_VM_TIMEOUT_S": str(TIMEOUT_S), "RDMA_VM_MODEL": str(model)}
    machine = ("--nics", str(NUM_NICS), "--memory-mib", str(MEMORY_MIB), "--timeout-s", f"{timeout_s:.0f}")
    command = [sys.executable, "-m", "tests.rdma_vm.vm", *machine, "--", *_pytest(share.name, share.arguments), "-v"]
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
            share.outcomes.read(line)
            _say(share, line.rstrip())
    running.discard(vm)
    share.code = vm.returncode
    _say(share, f"{summary(share.outcomes.counts())} after {time.monotonic() - began:.0f} s; exit code {share.code}")


def exit_code(shares: Sequence[Share]) -> int:
    codes = {share.code for share in shares}
    if PYTEST_FAILED in codes or any(share.outcomes.counts()["failed"] for share in shares):
        return PYTEST_FAILED
    return max(codes, default=NO_TESTS)


def main(arguments: Sequence[str]) -> int:
    # SIGTERM unwinds, so that the VMs end too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        ready_image()
    except ImageUnavailable as exc:
        print(f"rdma-vm: {exc}", file=sys.stderr)
        return EXIT_NO_IMAGE
    began = time.monotonic()
    running: set[subprocess.Popen[str]] = set()
    with TemporaryDirectory(prefix="rdma-vm-model-") as directory, ThreadPoolExecutor(NUM_VMS) as pool:
        try:
            shares = [share for share in pool.map(lambda name: collect(name, arguments), SHARES) if share.tests]
            subprocess.run([sys.executable, "-m", "compileall", "-q", *PACKAGES], env=_compiling(), check=True)
            model = Path(directory, "none")
            if any(share.name == DEMO for share in shares):
                model = _make_model(Path(directory))
            list(pool.map(lambda share: run(share, model, began + TIMEOUT_S, running), shares))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for vm in list(running):
                vm.terminate()
            raise
    for share in shares:
        for test in share.outcomes.not_run:
            print(f"not run: {test}")
    total = sum((share.outcomes.counts() for share in shares), Counter[str]())
    print(f"{summary(total)} in {time.monotonic() - began:.0f} s", flush=True)
    return exit_code(shares)


def _make_model(directory: Path) -> Path:
    from engine.llama_cpp.testing import make_tiny_gguf
    from engine.testing import make_tiny_model

    return make_tiny_gguf(make_tiny_model("llama", directory))


def _compiling() -> dict[str, str]:
    """The environment, but so that Python keeps what it compiles."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _pytest(name: str, arguments: Sequence[str]) -> list[str]:
    selected, files = SHARES[name]
    plugins = ("-p", "pytest_timeout", "-p", "pytest_asyncio.plugin", "-p", "no:cacheprovider")
    return [sys.executable, "-m", "pytest", *plugins, "-k", selected, *files, *arguments]


def _say(share: Share, line: str) -> None:
    with _printing:
        print(f"{share.name:8}| {line}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
