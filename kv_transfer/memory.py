"""One rank's KV pool in memory of our own: a single memfd that engines compute in and peers on the host map."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
from types import TracebackType

import numpy as np

from kv_transfer.errors import PoolUnavailable
from kv_transfer.layout import KVLayout, placement_of
from kv_transfer.placement import Placement
from kv_transfer.plan import PairPlan
from kv_transfer.pool import BlockPool
from kv_transfer.tensors import Memory
from kv_transfer.views import BlockView, ByteArray, HostView

NONCE_BYTES = 16
TRAILER = struct.Struct(f"<8s{NONCE_BYTES}sQ")
TRAILER_MAGIC = b"KVPOOL\x00\x01"
# Absent from Python's fcntl; Linux 5.1. Mappings made before it stay writable, new ones are read-only.
_F_SEAL_FUTURE_WRITE = 0x0010
# Absent from Python's mmap; Linux 5.14.
_MADV_POPULATE_WRITE = 23


class KVPool(BlockPool):
    """A zeroed pool of KV blocks, shared memory from its first byte on.

    Whoever allocates it closes it, after the engine's tensors and the messenger are gone. The file holds the regions
    one after the other, each from a page boundary on, then a trailer with a random nonce by which a peer that maps it
    can tell that it found this pool and not another one. It is sealed: nobody can resize it, and no other process can
    write to it.

    Attributes:
        fd: the memfd; for peers that open it through /proc.
        nonce: of this pool; [16] bytes.
    """

    def __init__(self, layout: KVLayout, fd: int, mapping: mmap.mmap, nonce: bytes) -> None:
        """For ``allocate``; takes ownership of ``fd`` and ``mapping``."""
        super().__init__(layout)
        self.fd = fd
        self.nonce = nonce
        self._mapping: mmap.mmap | None = mapping

    @classmethod
    def allocate(cls, layout: KVLayout, *, populate: bool = True) -> KVPool:
        """Reserve and map the memory.

        Args:
            populate: touch every page now, so that the first prefill does not pay for it.
        Raises:
            PoolUnavailable: the host has not that much memory, or no memfd.
        """
        offset = region_offsets(placement_of(layout))[-1]
        total = offset + mmap.PAGESIZE
        available = _available_bytes()
        if total > available:
            # The kernel would hand it out all the same, and kill some process for it later.
            raise PoolUnavailable(layout.pool_bytes, f"this host has {available} bytes available")
        try:
            fd = os.memfd_create("kv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as exc:
            raise PoolUnavailable(layout.pool_bytes, str(exc)) from exc
        try:
            os.ftruncate(fd, total)
            mapping = mmap.mmap(fd, total, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                _advise(mapping, mmap.MADV_HUGEPAGE)
            if populate:
                # First by the mapping, as fallocate() knows nothing of the advice and would take small pages.
                _advise(mapping, _MADV_POPULATE_WRITE)
                # Where there are no pages it fails here, not with SIGBUS in a forward pass.
                os.posix_fallocate(fd, 0, total)
            nonce = secrets.token_bytes(NONCE_BYTES)
            TRAILER.pack_into(mapping, offset, TRAILER_MAGIC, nonce, layout.pool_bytes)
            _seal(fd)
        except (OSError, ValueError, OverflowError) as exc:
            os.close(fd)
            raise PoolUnavailable(layout.pool_bytes, str(exc)) from exc
        return cls(layout, fd, mapping, nonce)

    @property
    def regions(self) -> tuple[ByteArray, ...]:
        """Each region's bytes, writable. What views outlive the pool keep its memory, though no peer finds it."""
        if self._mapping is None:
            raise ValueError("this KV pool is closed")
        placement = placement_of(self.layout)
        return tuple(
            np.frombuffer(self._mapping, np.uint8, size, offset)
            for size, offset in zip(placement.region_bytes, region_offsets(placement), strict=False)
        )

    @property
    def memory(self) -> tuple[Memory, ...]:
        return tuple(Memory(region.ctypes.data, region.nbytes, "cpu") for region in self.regions)

    @property
    def buffer(self) -> memoryview:
        """All bytes of a pool that has one region, writable; [pool_bytes]."""
        (region,) = self.regions
        return region.data

    def as_array(self) -> ByteArray:
        """All blocks of a pool that is packed block-major, writable: uint8 [num_blocks, block_bytes]; no copy."""
        if self.layout.placement is not None or not self.layout.packing.startswith("block-major"):
            raise ValueError(f"the blocks of a {self.layout.packing} pool are not contiguous: use regions")
        return np.frombuffer(self.buffer, dtype=np.uint8).reshape(self.layout.num_blocks, self.layout.block_bytes)

    def block_view(self, block_id: int, layer: int) -> ByteArray:
        """One block of one layer of a block-major pool, writable: uint8 [layer_block_bytes]; no copy."""
        if not 0 <= block_id < self.layout.num_blocks or not 0 <= layer < self.layout.num_rank_layers:
            raise IndexError(f"block {block_id} of layer {layer} is outside this pool")
        size = self.layout.layer_block_bytes
        return self.as_array()[block_id, layer * size : (layer + 1) * size]

    def view(self, plan: PairPlan, side: str) -> BlockView:
        return HostView(plan, side, self.layout.num_blocks, self.regions)

    def close(self) -> None:
        """Give the memory back. Idempotent. Pages still seen by an engine's tensor go when that tensor does."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        os.close(self.fd)
        try:
            mapping.close()
        except BufferError:
            # Somebody still holds a view: unmapping now would crash it. The last view's end unmaps.
            pass

    @property
    def shared_file(self) -> tuple[int, bytes]:
        return self.fd, self.nonce

    def __enter__(self) -> KVPool:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def region_offsets(placement: Placement) -> list[int]:
    """Where the regions of a pool's file begin, and then its trailer; [num_regions + 1]."""
    offsets = [0]
    for size in placement.region_bytes:
        offsets.append(-(-(offsets[-1] + size) // mmap.PAGESIZE) * mmap.PAGESIZE)
    return offsets


def _available_bytes() -> int:
    """Memory that can be had without swapping; at most the limit of this process's control group."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            found.append(int(file.read()))
    except (OSError, ValueError):
        # No such file at the root group and under cgroup v1, and "max" where there is no limit.
        pass
    return min(found, default=2**63)


def _advise(mapping: mmap.mmap, advice: int) -> None:
    try:
        mapping.madvise(advice)
    except OSError:
        # Older kernels, and those without huge pages for shared memory, refuse; it is a wish, not a need.
        pass


def _seal(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
    except OSError:
        # Before Linux 5.1: peers of the same user could map it writable, as they could write any memory of ours.
        pass
