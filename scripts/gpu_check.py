"""All that can be checked on a GPU machine, from bare: CUDA, torch, cupy and wheels that were carried there.

Installs missing packages and this one into a folder of their own, then runs, each with its time-out and whether or not
the ones before it passed: the device itself, the GPU tests, the demo on the GPU, the benchmark. Results go to
``benchmarks/results/<gpu>-*.json``. Ends with a table; exit code 0 when every step passed, or when there is no device.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAME_OF_GPU = """
from kv_transfer.errors import TransportFailed
from kv_transfer.transports.cuda_ipc.runtime import open_runtime
try:
    print("gpu:", open_runtime().describe(0))
except TransportFailed as exc:
    print(exc)
"""


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    timeout_s: int


@dataclass(frozen=True)
class Outcome:
    step: str
    result: str
    seconds: float


def steps(gpu: str, quick: bool) -> list[Step]:
    """Their time-outs, with installing, add up to less than nine minutes."""
    python = sys.executable
    results = RESULTS / gpu
    demo = "demo --device cuda --cache-transfer-protocol ipc,tcp --requests 32 --concurrency 8"
    return [
        Step("GPU tests", [python, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"], 220),
        Step("demo", [python, "-m", "splitwise_sched", *demo.split(), "--json", f"{results}-demo.json"], 120),
        Step(
            "benchmark",
            [python, "-m", "benchmarks.cuda_ipc", "--json", f"{results}-cuda_ipc.json"]
            + (["--quick"] if quick else []),
            140,
        ),
    ]


def install(wheels: Path, site: Path) -> None:
    """What is missing here, and this package's own metadata: its transports and verbs are found by it."""
    shutil.rmtree(site, ignore_errors=True)
    missing = [wheel for wheel in sorted(wheels.glob("*.whl")) if not is_installed(wheel.name.split("-")[0])]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    if missing:
        run([*pip, "--target", str(site), *map(str, missing)], 120, env)
    run([*pip, "--no-build-isolation", "--target", str(site), "--upgrade", str(ROOT)], 60, env)


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def run(command: list[str], timeout_s: int, env: dict[str, str]) -> tuple[str, str]:
    """How a command ended, and what it printed; its whole process group is gone afterwards."""
    print("+", " ".join(command[:8]).split("\n", maxsplit=1)[0], flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        result = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        result = f"timed out ({timeout_s} s)"
    print(output, flush=True)
    return result, output


def main() -> int:
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    flags.add_argument("--wheels", type=Path, default=ROOT / ".gpu-wheels", help="made by scripts/gpu_wheels.sh")
    flags.add_argument("--site", type=Path, default=ROOT / ".gpu-site", help="where missing packages are installed")
    flags.add_argument("--no-install", action="store_true", help="everything is installed already")
    flags.add_argument("--quick", action="store_true", help="the benchmark in its quick form")
    args = flags.parse_args()
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    outcomes = []
    if not args.no_install:
        install(args.wheels, args.site)
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(args.site)])
        outcomes.append(Outcome("install", "passed", time.monotonic() - began))
    found = time.monotonic()
    result, output = run([sys.executable, "-c", NAME_OF_GPU], 60, env)
    name = re.search(r"^gpu: (.+)$", output, re.MULTILINE)
    outcomes.append(Outcome("device", name[1] if name else "no CUDA device", time.monotonic() - found))
    gpu = re.sub(r"[^a-z0-9]+", "-", name[1].lower()).strip("-") if name else "none"
    for step in steps(gpu, args.quick):
        started = time.monotonic()
        result = "no CUDA device" if name is None else run(step.command, step.timeout_s, env)[0]
        outcomes.append(Outcome(step.name, result, time.monotonic() - started))
    print(f"\n{'step':<12} {'seconds':>8}  result")
    for outcome in outcomes:
        print(f"{outcome.step:<12} {outcome.seconds:>8.1f}  {outcome.result}")
    print(f"{'all':<12} {time.monotonic() - began:>8.1f}")
    return 0 if name is None or all("failed" not in o.result and "timed out" not in o.result for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
