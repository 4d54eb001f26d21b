"""What docs/fastdeploy.md shows runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from splitwise_sched.fastdeploy.config import WITHOUT_EFFECT

DOCUMENT = (Path(__file__).parents[2] / "docs" / "fastdeploy.md").read_text()


def test_node_of_the_document_prints_what_the_document_says(redis_server):
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert "port=6379" in program
    program = program.replace("port=6379", f"port={redis_server.port}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (said,) = re.findall(r"it prints `(.*?)`", DOCUMENT)
    assert done.stdout.strip() == said


def test_every_option_without_effect_is_in_the_document_with_its_default():
    for name, (default, _) in WITHOUT_EFFECT.items():
        assert re.search(rf"`{name}` \({default}[^)]*\).*\| no effect", DOCUMENT), name
