"""Other libraries, each in processes of its own: what they load and leave behind stays there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 600
_REMEDY = {"nixl": "pip install 'splitwise-sched[nixl]'", "mooncake": "pip install 'splitwise-sched[mooncake]'"}


def run_peer(package: str, numbers: Sequence[int]) -> list[dict[str, Any]] | str:
    """What ``benchmarks.kv.<package>_peer`` has measured, a run a row; or why it cannot.

    Args:
        numbers: MiB of the pool, of a round and of a slice; rounds; block sizes in KiB.
    """
    command = [sys.executable, "-m", f"benchmarks.kv.{package}_peer", *(str(n) for n in numbers)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it did not end within {_TIMEOUT_S} s"
    lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("RUN ")]
    if not lines:
        errors = done.stderr.strip().splitlines()
        why = errors[-1] if errors else f"it ended with {done.returncode}"
        return f"{why} ({_REMEDY[package]})"
    return [json.loads(line) for line in lines]
