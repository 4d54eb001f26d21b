"""The arrows between the packages, as every module's source has them: engine -> splitwise_sched and kv_transfer."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("splitwise_sched", "kv_transfer", "engine")
ALLOWED = {"splitwise_sched": set(), "kv_transfer": set(), "engine": {"splitwise_sched", "kv_transfer"}}
FORBIDDEN_MODULES = {
    "splitwise_sched": {"torch", "transformers", "numpy", "cupy"},
    "kv_transfer": {"redis", "torch", "transformers", "pydantic", "pydantic_settings", "click"},
    "engine": {"redis"},
}
# Where redis-py is: how a server is reached, and which.
REDIS_MODULES = ("splitwise_sched/dialing.py", "splitwise_sched/discovery.py")
# The data plane's verbs: the only ones of its modules that know of a command line.
VERBS = "kv_transfer/cli/"
DANGEROUS_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
DANGEROUS_CALLS = {"eval", "exec", "compile", "__import__"}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all that is imported, anywhere in the module: under TYPE_CHECKING and in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name their package in full"
            assert node.module is not None
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and _name(node.func) == "import_module" and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value.partition(".")[0]


def complaints(module: str, source: str) -> list[str]:
    """What in ``source``, as the text of ``module``, breaks the rules."""
    tree = ast.parse(source)
    package = module.partition("/")[0]
    imported = set(imports(tree))
    found = [f"imports {name}" for name in sorted(imported & set(PACKAGES) - ALLOWED[package] - {package})]
    allowed = {"click"} if module.startswith(VERBS) else set()
    found += [f"imports {name}" for name in sorted(imported & FORBIDDEN_MODULES[package] - allowed)]
    found += [f"imports {name}" for name in sorted(imported & DANGEROUS_MODULES)]
    if "redis" in imported and module not in REDIS_MODULES and package == "splitwise_sched":
        found.append(f"imports redis, which {REDIS_MODULES} alone may")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in DANGEROUS_CALLS:
            found.append(f"calls {node.func.id} on line {node.lineno}")
    return found


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_to_its_layer(path: Path) -> None:
    assert complaints(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("splitwise_sched/x.py", "import torch"),
        ("splitwise_sched/x.py", "def f():\n    from engine.port import Mode"),
        ("splitwise_sched/x.py", "import importlib\nimportlib.import_module('kv_transfer.plan')"),
        ("splitwise_sched/x.py", "from redis.asyncio import Redis"),
        ("kv_transfer/x.py", "import redis"),
        ("kv_transfer/x.py", "from splitwise_sched import types"),
        ("engine/x.py", "import redis"),
        ("engine/x.py", "import pickle"),
        ("engine/x.py", "eval('1')"),
    ],
)
def test_the_check_sees_what_it_is_for(module: str, source: str) -> None:
    assert complaints(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine/x.py", "from splitwise_sched import types\nimport kv_transfer, torch\nmodel.eval()"),
        (REDIS_MODULES[0], "import redis.asyncio"),
        ("kv_transfer/x.py", "import numpy, msgpack\nfrom kv_transfer.plan import x"),
    ],
)
def test_the_check_lets_pass_what_is_right(module: str, source: str) -> None:
    assert complaints(module, source) == []


def test_every_package_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)


def test_modules_are_written_for_the_oldest_python_that_is_promised() -> None:
    assert sys.version_info >= (3, 10)
    for path in MODULES:
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))
