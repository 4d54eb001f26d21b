"""The wheel as a stranger gets it: built from the tree, installed into an environment that has nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("splitwise_sched", "kv_transfer", "engine")
BUILD_FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Installed:
    """A built wheel, and an environment with it and what it requires."""

    wheel: Path
    bin: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        # Elsewhere than in the tree, whose packages would be imported instead.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.wheel.parent,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def python(self, code: str) -> str:
        run = self.run("python", "-c", code)
        assert run.returncode == 0, run.stderr
        return run.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    tree.mkdir()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, tree / name)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(place), str(tree)], check=True, capture_output=True
    )
    (wheel,) = place.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    result = Installed(wheel, place / "venv" / "bin")
    install = result.run("python", "-m", "pip", "install", "--quiet", str(wheel))
    assert install.returncode == 0, install.stderr
    return result


def test_wheel_holds_every_file_that_the_packages_use(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.lua", "*.txt", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    assert {"splitwise_sched/lua/submit.lua", "splitwise_sched/py.typed", "engine/py.typed"} <= wanted
    assert wanted - names == set()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_scheduler_imports_without_torch_and_transfer_without_redis(installed: Installed) -> None:
    installed.python("import splitwise_sched, sys; assert 'torch' not in sys.modules")
    installed.python(
        "import splitwise_sched.frontend, splitwise_sched.instance, sys\n"
        "assert not {'torch', 'numpy', 'kv_transfer', 'engine'} & set(sys.modules)"
    )
    installed.python(
        "import kv_transfer.messenger, sys\n"
        "assert not {'torch', 'redis', 'pydantic', 'splitwise_sched', 'engine'} & set(sys.modules)"
    )


def test_scripts_are_found_in_the_installed_package(installed: Installed) -> None:
    code = "from importlib.resources import files; print((files('splitwise_sched') / 'lua' / 'submit.lua').is_file())"
    assert installed.python(code) == "True\n"


def test_command_runs_and_says_what_its_verbs_need(installed: Installed) -> None:
    help_text = installed.run("splitwise-sched", "--help")
    assert help_text.returncode == 0, help_text.stderr
    assert "redis" in help_text.stdout and "serve" in help_text.stdout
    assert installed.run("splitwise-sched", "redis", "--help").returncode == 0
    serve = installed.run("splitwise-sched", "serve", "--model", "nowhere")
    assert serve.returncode == 2
    assert "pip install 'splitwise-sched[engine]'" in serve.stderr
    gateway = installed.run("splitwise-sched", "gateway")
    assert gateway.returncode == 2
    assert "pip install 'splitwise-sched[gateway]'" in gateway.stderr
