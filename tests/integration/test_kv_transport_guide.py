"""The transport of docs/transport-guide.md, registered by the line shown there, passes the conformance suite."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.integration.kv_rank import ROOT

GUIDE = ROOT / "docs" / "transport-guide.md"
SUITE = ROOT / "tests" / "integration" / "test_kv_conformance.py"
EXAMPLE = ROOT / "docs" / "examples" / "file_transport.py"


def test_the_guide_shows_the_example_as_it_is() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.S)
    assert shown in EXAMPLE.read_text(encoding="utf-8")


def test_the_example_joins_the_conformance_suite_by_one_line_and_passes_it(tmp_path: Path) -> None:
    line = re.search(r"file = file_transport:FileTransport", GUIDE.read_text(encoding="utf-8"))
    assert line is not None
    shutil.copy(EXAMPLE, tmp_path)
    installed = tmp_path / "file_transport-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: file-transport\nVersion: 1.0\n", encoding="ascii")
    (installed / "entry_points.txt").write_text(f"[kv_transfer.transports]\n{line[0]}\n", encoding="ascii")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "file", str(SUITE)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 20, done.stdout[-500:]
    assert "skipped" not in done.stdout
