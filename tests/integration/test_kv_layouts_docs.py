"""docs/kv-layouts.md: its example runs, and its table names what there is."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.integration.kv_rank import ROOT

TEXT = (ROOT / "docs" / "kv-layouts.md").read_text(encoding="utf-8")


def test_the_example_registers_an_engines_tensors() -> None:
    pytest.importorskip("torch")
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Placement(region_bytes=(262144, 262144, 262144, 262144)")
    assert "peers cannot fetch KV from prefill-0 by shm" in done.stderr
