"""A pyverbs that is missing, that does not fit, that meddles with logging, or that does not tell its descriptors."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kv_transfer.errors import RdmaUnavailable
from kv_transfer.transports.rdma import verbs
from kv_transfer.transports.rdma.device import close_descriptor, opened_descriptor


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The distribution's directory, empty; any pyverbs of this machine is out of sight."""

    def forget() -> None:
        verbs.load_verbs.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "pyverbs"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr(verbs, "_DISTRIBUTION_PACKAGES", tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "pyverbs").exists()])
    yield tmp_path
    forget()


def install(packages: Path, **modules: str) -> None:
    directory = packages / "pyverbs"
    directory.mkdir()
    for name, source in {"__init__": "", **modules}.items():
        (directory / f"{name}.py").write_text(source)


def test_without_pyverbs_the_packages_to_install_are_named(packages: Path) -> None:
    with pytest.raises(
        RdmaUnavailable, match=r"not installed: apt-get install python3-pyverbs .*splitwise-sched\[rdma\]"
    ):
        verbs.load_verbs()


def test_a_pyverbs_of_another_python_is_told_from_one_that_is_missing(packages: Path) -> None:
    install(packages)
    with pytest.raises(
        RdmaUnavailable, match=r"has no pyverbs.device for Python 3\.\d+: it was built for another version"
    ):
        verbs.load_verbs()


def test_a_pyverbs_of_another_rdma_core_release_is_told_as_such(packages: Path) -> None:
    install(packages, device='raise ImportError("libibverbs.so.1: version `IBVERBS_PRIVATE_59\' not found")')
    with pytest.raises(RdmaUnavailable, match=r"does not fit this host .*IBVERBS_PRIVATE_59.*same rdma-core release"):
        verbs.load_verbs()


@pytest.mark.parametrize("enums", ["enums", "libibverbs_enums"])
def test_the_distributions_pyverbs_is_found_whatever_its_release_and_logging_stays_as_it_was(
    packages: Path, enums: str
) -> None:
    install(
        packages,
        device="import logging\nlogging.basicConfig(level=logging.DEBUG, force=False)\nclass Context: pass",
        addr="class AHAttr: pass\nclass GlobalRoute: pass\nclass GID: pass",
        cq="class CQ: pass\nclass CompChannel: pass",
        qp="class QP: pass\nclass QPInitAttr: pass\nclass QPAttr: pass\nclass QPCap: pass",
        wr="class SGE: pass\nclass SendWR: pass\nclass RecvWR: pass",
        mr="class MR: pass",
        pd="class PD: pass",
        pyverbs_error="class PyverbsError(Exception): pass",
        **{enums: "IBV_QPT_RC = 2"},
    )
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        found = verbs.load_verbs()
        assert (root.handlers, root.level) == ([], logging.WARNING)
    finally:
        root.handlers = before
    assert (found.enums.IBV_QPT_RC, found.DmaBufMR) == (2, None)
    assert str(packages) in sys.modules["pyverbs"].__path__[0]


def test_no_descriptor_is_closed_while_a_new_one_is_looked_for() -> None:
    """The new one would get its number, and not be found."""
    closed = threading.Event()
    made = SimpleNamespace(close=closed.set)
    closing = threading.Thread(target=close_descriptor, args=(made,))

    def make() -> object:
        closing.start()
        assert not closed.wait(0.2)
        return object()

    opened_descriptor(make)
    closing.join(10)
    assert closed.is_set()
