"""docs/engine-guide.md leads to an engine that works: its listings are the programs, and these run as it says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("httpx")

from engine.demo.fleet import Fleet
from engine.settings import EngineSettings
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.types import Role
from tests.engine_drivers import greedy, random_prompt, run
from tests.integration.toy import tokens_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = DOCS / "examples"
GUIDE = (DOCS / "engine-guide.md").read_text(encoding="utf-8")
PROGRAMS = ("toy_engine.py", "test_toy_engine.py")


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A directory in which a reader has done what the guide says; on PYTHONPATH it is as if installed."""
    for program in PROGRAMS:
        shutil.copy(EXAMPLES / program, tmp_path)
    (entry_points,) = re.findall(r"^```ini\n\[options.entry_points]\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    group, target = re.fullmatch(r"([\w.]+) =\n +(.+)\n", entry_points).groups()
    info = tmp_path / "toy_engine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-engine\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{target}\n")
    (tmp_path / "toy.txt").write_text("toy-1\n")
    return tmp_path


def test_listings_are_the_programs() -> None:
    shown = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    assert shown == [(EXAMPLES / program).read_text(encoding="utf-8") for program in PROGRAMS]


def test_toy_engine_passes_the_suite_and_a_broken_one_does_not(reader: Path) -> None:
    def suite() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_toy_engine.py"]
        return subprocess.run(command, cwd=reader, capture_output=True, text=True, timeout=200, check=False)

    done = suite()
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
    program = reader / "toy_engine.py"
    source = program.read_text()
    assert "self._kv[sequence.blocks[block], :, row]" in source
    program.write_text(source.replace("self._kv[sequence.blocks[block], :, row]", "self._kv[block, :, row]"))
    broken = suite()
    assert broken.returncode == 1 and " failed" in broken.stdout


async def test_toy_engine_serves_by_its_name(reader: Path) -> None:
    spec = importlib.util.spec_from_file_location("toy_engine", reader / "toy_engine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    requests = [greedy(tuple(t % 512 for t in random_prompt(length)), 20) for length in (1, 16, 33, 200)]
    engine = module.ToyPlugin().create(EngineSettings(engine="toy", model=str(reader / "toy.txt")), Role.MIXED)
    expected = {key: result.tokens for key, result in run(engine, requests).items()}
    engine.close()
    with Fleet() as fleet:
        for role in ("prefill", "decode"):
            arguments = re.findall(rf"^splitwise-sched (serve --engine toy .* {role})$", GUIDE, re.MULTILINE)[0].split()
            arguments[arguments.index("toy.txt")] = str(reader / "toy.txt")
            arguments += ["--served-model-name", "tiny", "--instance-name", role]
            fleet.start(role, arguments, env={"PYTHONPATH": str(reader)})
        await fleet.wait_for_instances(2)
        async with FrontEnd(fleet.settings) as frontend:
            streams = [await frontend.submit(request) for request in requests]
            got = {s.request_id: await tokens_of(s) for s in streams}
            records = [await frontend.request_record(request.request_id) for request in requests]
        fleet.check()
    assert got == expected
    assert {record["lane"] for record in records} == {"shm"}, "KV moved"
