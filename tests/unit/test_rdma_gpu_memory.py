"""Which way GPU memory is registered, as far as it can be told without a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kv_transfer.errors import PoolNotServed
from kv_transfer.transports.rdma.gpu_memory import Registration, choose_registration, export_dmabuf, register_dmabuf


def verbs(*, has_dmabuf: bool) -> Any:
    return SimpleNamespace(DmaBufMR=(lambda *args: args) if has_dmabuf else None)


class Driver(ModuleType):
    """The CUDA driver's part in exporting memory."""

    CUmemRangeHandleType = SimpleNamespace(CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD=1)

    def __init__(self, error: int = 0) -> None:
        super().__init__("cuda.bindings.driver")
        self.error, self.asked = error, (0, 0)

    def cuMemGetHandleForAddressRange(self, begin: int, size: int, kind: int, flags: int) -> tuple[int, int]:
        self.asked = begin, size
        return self.error, os.open(os.devnull, os.O_RDONLY)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made)
    return made


def test_host_memory_needs_nothing(tmp_path: Path) -> None:
    assert choose_registration("cpu", verbs(has_dmabuf=False), tmp_path) is Registration.HOST


@pytest.mark.parametrize("module", ["nvidia_peermem", "nv_peer_mem"])
def test_the_peer_memory_module_comes_first(tmp_path: Path, driver: Driver, module: str) -> None:
    (tmp_path / "module" / module).mkdir(parents=True)
    assert choose_registration("cuda:0", verbs(has_dmabuf=True), tmp_path) is Registration.PEER_MEMORY


def test_a_dmabuf_is_taken_where_driver_and_pyverbs_have_it(tmp_path: Path, driver: Driver) -> None:
    assert choose_registration("cuda:0", verbs(has_dmabuf=True), tmp_path) is Registration.DMABUF


def test_with_neither_the_pool_is_not_served_and_the_remedy_is_named(tmp_path: Path, driver: Driver) -> None:
    with pytest.raises(PoolNotServed, match="modprobe nvidia_peermem"):
        choose_registration("cuda:0", verbs(has_dmabuf=False), tmp_path)


def test_whole_pages_are_exported_and_the_memory_is_found_in_them(driver: Driver) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    (_, num_bytes, access, _, offset), address = register_dmabuf(verbs(has_dmabuf=True), None, 0x10_0200, 5000, 7)
    assert driver.asked == (0x10_0000, 8192)
    assert (num_bytes, access, offset, address) == (5000, 7, 0x200, 0x200)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_refusal_of_the_driver_is_passed_on() -> None:
    with pytest.raises(PoolNotServed, match="no dmabuf of the pool"):
        export_dmabuf(Driver(error=801), 0, 4096)
