"""setup.cfg, Makefile and the tree agree with each other."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def entry_points() -> list[str]:
    lines = "\n".join(setup_cfg()["options.entry_points"].values()).splitlines()
    return [line.split("=", 1)[1].strip() for line in lines if "=" in line]


@pytest.mark.parametrize("target", entry_points())
def test_entry_point_names_a_module_and_a_name_that_exist(target: str) -> None:
    module, name = target.split(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = ROOT / module.replace(".", "/") / "__init__.py"
    assert path.exists(), f"{target}: there is no such module"
    assert re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")), f"{target}: {path} has no {name}"


def test_extras_that_others_build_on_exist() -> None:
    extras = setup_cfg()["options.extras_require"]
    assert {"engine", "gateway", "embedded", "cuda", "rdma", "demo", "dev"} <= set(extras)
    # The pip that comes with Python 3.11 installs nothing for a name with an underscore, and goes on.
    assert not [name for name in extras if "_" in name]
    named = {
        name
        for text in extras.values()
        for names in re.findall(r"splitwise-sched\[([^]]+)]", text)
        for name in names.split(",")
    }
    assert named <= set(extras)


def test_licence_is_what_the_metadata_says() -> None:
    assert setup_cfg()["metadata"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and len(text) > 10_000


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "test-rdma", "lint", "check", "bench", "wheel", "clean"])
def test_make_knows_every_target_and_what_it_needs_in_a_fresh_clone(target: str, tmp_path: Path) -> None:
    run = subprocess.run(
        ["make", "--dry-run", f"VENV={tmp_path}/venv", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    if target not in ("clean",):
        steps = run.stdout
        assert steps.index("-m venv") < steps.index("torch") < steps.index("--editable")
