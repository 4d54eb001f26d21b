"""pyverbs, loaded when it is first needed; its names as they are in rdma-core 44 and in newer releases."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from kv_transfer.errors import RdmaUnavailable

# Where Debian and Ubuntu put it, out of sight of a virtual environment.
_DISTRIBUTION_PACKAGES = Path("/usr/lib/python3/dist-packages")


@dataclass(frozen=True, slots=True)
class Verbs:
    """What is used of pyverbs. Nothing of it releases the interpreter's lock."""

    Context: Any
    PD: Any
    MR: Any
    DmaBufMR: Any
    CQ: Any
    CompChannel: Any
    QP: Any
    QPInitAttr: Any
    QPAttr: Any
    QPCap: Any
    AHAttr: Any
    GlobalRoute: Any
    GID: Any
    SGE: Any
    SendWR: Any
    RecvWR: Any
    enums: Any
    Error: type[Exception]


@lru_cache(maxsize=1)
def load_verbs() -> Verbs:
    """
    Raises:
        RdmaUnavailable: pyverbs is not there, or does not fit the rdma-core of this host; says what to install.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        return _load()
    except ImportError as exc:
        raise RdmaUnavailable(_explain(exc)) from exc
    finally:
        # Importing pyverbs calls logging.basicConfig: how this process logs is not its business.
        for handler in [h for h in root.handlers if h not in handlers]:
            root.removeHandler(handler)
        root.setLevel(level)


def _load() -> Verbs:
    _find_package()

    def module(name: str) -> ModuleType:
        return importlib.import_module(f"pyverbs.{name}")

    device, addr, cq, qp, wr, mr = (module(name) for name in ("device", "addr", "cq", "qp", "wr", "mr"))
    try:
        enums = module("libibverbs_enums")
    except ModuleNotFoundError:
        # Before rdma-core 52 or so.
        enums = module("enums")
    return Verbs(
        Context=device.Context,
        PD=module("pd").PD,
        MR=mr.MR,
        DmaBufMR=getattr(mr, "DmaBufMR", None),
        CQ=cq.CQ,
        CompChannel=cq.CompChannel,
        QP=qp.QP,
        QPInitAttr=qp.QPInitAttr,
        QPAttr=qp.QPAttr,
        QPCap=qp.QPCap,
        AHAttr=addr.AHAttr,
        GlobalRoute=addr.GlobalRoute,
        GID=addr.GID,
        SGE=wr.SGE,
        SendWR=wr.SendWR,
        RecvWR=wr.RecvWR,
        enums=enums,
        Error=module("pyverbs_error").PyverbsError,
    )


def _find_package() -> None:
    """Make the distribution's pyverbs importable from a virtual environment, and no other package of its with it."""
    if "pyverbs" in sys.modules or importlib.util.find_spec("pyverbs") is not None:
        return
    directory = _DISTRIBUTION_PACKAGES / "pyverbs"
    spec = importlib.util.spec_from_file_location(
        "pyverbs", directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    if not directory.is_dir() or spec is None or spec.loader is None:
        raise ModuleNotFoundError("No module named 'pyverbs'", name="pyverbs")
    package = importlib.util.module_from_spec(spec)
    sys.modules["pyverbs"] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules["pyverbs"]
        raise


def _explain(exc: ImportError) -> str:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if isinstance(exc, ModuleNotFoundError) and exc.name == "pyverbs":
        return (
            "pyverbs, the Python side of rdma-core, is not installed: apt-get install python3-pyverbs "
            "ibverbs-providers (or the vendor's MOFED packages), for the distribution's own Python version; or, with a "
            "matching rdma-core and its headers, pip install 'splitwise-sched[rdma]'"
        )
    if isinstance(exc, ModuleNotFoundError) and exc.name is not None and exc.name.startswith("pyverbs."):
        return (
            f"the installed pyverbs has no {exc.name} for Python {python}: it was built for another version; run the "
            "Python that it was built for (Debian's is /usr/bin/python3), or build pyverbs for this one: pip install "
            "'splitwise-sched[rdma]' with rdma-core's headers"
        )
    return (
        f"the installed pyverbs does not fit this host ({exc}): pyverbs and libibverbs must come from the same "
        "rdma-core release, so install both from one source (the distribution's python3-pyverbs with its libibverbs1 "
        "and ibverbs-providers, or all of MOFED's), or rebuild pyverbs against the libibverbs that is here"
    )
