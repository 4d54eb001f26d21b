"""When is what an engine computes in its blocks: its stream's events, shared with the peers that read.

Kernels run long after the engine's thread has launched them, so that "these blocks are ready" is said before they are.
Each forward pass records events between its layers, in one of a few sets that are used in turn; a page that peers map
names the pass that each block was last announced in. Before it copies a group of layers, a reader looks whether that
pass's event for the group is done. A set that was used again in the meantime makes it wait longer, never shorter.

The reader asks, and does not have its stream wait: a stream that waits for an event of a process that has died cannot
be taken back.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kv_transfer.plan import IntArray
from kv_transfer.transports.cuda_ipc.runtime import Runtime

# Passes that may be under way on the device before their events are used again.
NUM_SETS = 4
MAX_GROUPS = 8


def group_ends(num_layers: int) -> list[int]:
    """The last layer of each group: all groups of nearly one size."""
    count = min(num_layers, MAX_GROUPS)
    return [num_layers * (group + 1) // count - 1 for group in range(count)]


class ComputeOrder:
    """Of one pool, in the process whose engine computes in it. Methods are called from the engine's thread.

    Attributes:
        fd: of the page; [num_blocks] uint64, ``2 * pass + (1 if its layers have events)``, 0 for never.
        events: [NUM_SETS * number of groups]
    """

    def __init__(
        self, runtime: Runtime, device: int, num_layers: int, num_blocks: int, stream: Callable[[], int]
    ) -> None:
        """
        Args:
            stream: the stream that the engine's kernels are launched on just now.
        """
        self._runtime, self._device, self._stream = runtime, device, stream
        self._group_of = {layer: group for group, layer in enumerate(group_ends(num_layers))}
        self.num_groups = len(self._group_of)
        self.events = [runtime.create_event(device, shared=True) for _ in range(NUM_SETS * self.num_groups)]
        self._written = runtime.create_event(device)
        self._lock = threading.Lock()
        self._num_claims = 0
        self.fd = os.memfd_create("kv-cuda-order", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, 8 * num_blocks)
        self._mapping = mmap.mmap(self.fd, 8 * num_blocks)
        self.page: npt.NDArray[np.uint64] = np.frombuffer(self._mapping, np.uint64)
        self._pass = 0
        self._in_pass = False

    def begin_pass(self) -> None:
        """A forward pass is about to be launched."""
        with self._lock:
            self._pass += 1
        self._in_pass = True

    def layer_done(self, layer: int) -> None:
        """The kernels that write this rank's layer ``layer`` have been launched, and those of all before it."""
        group = self._group_of.get(layer)
        if group is not None:
            event = self.events[self._pass % NUM_SETS * self.num_groups + group]
            self._runtime.record(self._device, event, self._stream())

    def announce(self, block_ids: IntArray) -> None:
        """What has been launched makes these blocks complete; called before any peer is told of them."""
        if not self._in_pass:
            # An engine that does not say where its layers end: all that it has launched so far.
            with self._lock:
                self._pass += 1
                self._runtime.record(self._device, self.events[self._last_event], self._stream())
        self.page[block_ids] = 2 * self._pass + self._in_pass

    def claim(self) -> None:
        """Blocks are about to be written from outside: not before what the engine has launched is done with them."""
        with self._lock:
            self._runtime.record(self._device, self._written, self._stream())
            self._num_claims += 1

    def hold_back(self, stream: int, since: int) -> int:
        """Have ``stream`` wait for the claims after the first ``since``; their number now. From any thread."""
        with self._lock:
            if self._num_claims > since:
                self._runtime.wait(stream, self._written)
            return self._num_claims

    def follow(self, stream: int) -> None:
        """Have a stream of this process wait for all that was announced. From any thread."""
        with self._lock:
            if self._pass:
                self._runtime.wait(stream, self.events[self._last_event])

    @property
    def _last_event(self) -> int:
        return self._pass % NUM_SETS * self.num_groups + self.num_groups - 1

    def close(self) -> None:
        for event in (*self.events, self._written):
            self._runtime.destroy_event(event)
        self.events = []
        self.page = np.empty(0, np.uint64)
        os.close(self.fd)
        try:
            self._mapping.close()
        except BufferError:
            # A reader in this very process still looks at it: the page goes with him.
            pass


class PeerOrder:
    """The same as a reader of the pool sees it."""

    def __init__(self, runtime: Runtime, page: npt.NDArray[np.uint64], events: Sequence[int], num_groups: int) -> None:
        """
        Args:
            page: as in ``ComputeOrder``.
            events: imported, or those of this very process.
        """
        self._runtime, self._page, self._events = runtime, page, events
        self.num_groups = num_groups

    def close(self) -> None:
        """Let go of the page."""
        self._page = np.empty(0, np.uint64)

    def mark(self, block_ids: IntArray) -> int:
        """What ``groups_done`` needs to know of blocks that were announced."""
        return int(self._page[block_ids].max()) if len(block_ids) else 0

    def groups_done(self, mark: int, after: int) -> int:
        """How many groups of layers are complete, of those from group ``after`` on; never waits."""
        number, is_layered = divmod(mark, 2)
        if not number:
            return self.num_groups
        first = number % NUM_SETS * self.num_groups
        if self._runtime.is_done(self._events[first + self.num_groups - 1]):
            return self.num_groups
        done = after
        while is_layered and done < self.num_groups - 1 and self._runtime.is_done(self._events[first + done]):
            done += 1
        return done


def map_page(fd: int, num_blocks: int) -> npt.NDArray[np.uint64]:
    """A peer's page, read-only. Raises OSError or ValueError when the file is not so long."""
    return np.frombuffer(mmap.mmap(fd, 8 * num_blocks, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ), np.uint64)
