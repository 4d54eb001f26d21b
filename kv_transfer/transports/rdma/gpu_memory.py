"""How a pool in GPU memory is made known to a NIC. Chosen at start, and reported; not yet run on hardware.

With the kernel module nvidia_peermem, a device pointer is registered like any other. Without it, a dmabuf of the memory
is, where the CUDA driver, the kernel and pyverbs have that. With neither the pool is not registered, and its blocks go
through host memory, which is what tcp does.
"""

from __future__ import annotations

import importlib
import mmap
import os
from enum import Enum
from pathlib import Path
from typing import Any

from kv_transfer.errors import PoolNotServed
from kv_transfer.sysfs import SYSFS
from kv_transfer.transports.rdma.verbs import Verbs

_PEER_MEMORY_MODULES = ("nvidia_peermem", "nv_peer_mem")
_CUDA_BINDINGS = ("cuda.bindings.driver", "cuda.cuda")


class Registration(Enum):
    """Ways to register memory; the value is for people."""

    HOST = "host memory"
    PEER_MEMORY = "GPU memory by nvidia_peermem"
    DMABUF = "GPU memory by dmabuf"


def choose_registration(device: str, verbs: Verbs, root: Path = SYSFS) -> Registration:
    """
    Args:
        device: of the pool, such as "cpu" or "cuda:0".
    Raises:
        PoolNotServed: there is no way; says what would make one.
    """
    if device == "cpu":
        return Registration.HOST
    if any((root / "module" / module).is_dir() for module in _PEER_MEMORY_MODULES):
        return Registration.PEER_MEMORY
    if verbs.DmaBufMR is not None and cuda_driver() is not None:
        return Registration.DMABUF
    raise PoolNotServed(
        f"the pool is on {device}, and this host can register no GPU memory: load nvidia_peermem (modprobe "
        "nvidia_peermem), or install cuda-python for dmabuf; until then its blocks go through host memory"
    )


def cuda_driver() -> Any | None:
    """The driver's Python bindings; None where there are none."""
    for name in _CUDA_BINDINGS:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def export_dmabuf(driver: Any, address: int, num_bytes: int) -> tuple[int, int]:
    """A descriptor of the memory, for the caller to close, and where the memory begins in it.

    Raises:
        PoolNotServed: the driver refuses, as it does for memory that was not allocated for export.
    """
    page = mmap.PAGESIZE
    begin = address // page * page
    size = -(-(address + num_bytes - begin) // page) * page
    kind = driver.CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
    error, fd = driver.cuMemGetHandleForAddressRange(begin, size, kind, 0)
    if int(error):
        raise PoolNotServed(f"the CUDA driver gives no dmabuf of the pool ({error}): load nvidia_peermem instead")
    return int(fd), address - begin


def register_dmabuf(verbs: Verbs, pd: Any, address: int, num_bytes: int, access: int) -> tuple[Any, int]:
    """A region of GPU memory, and the address that work requests name it by."""
    driver = cuda_driver()
    assert driver is not None, "choose_registration has looked"
    fd, offset = export_dmabuf(driver, address, num_bytes)
    try:
        # pyverbs registers it under its offset.
        return verbs.DmaBufMR(pd, num_bytes, access, fd, offset), offset
    finally:
        os.close(fd)
