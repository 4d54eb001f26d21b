"""What carries out one plan between a mapped pool and ours: straight, or through buffers where devices cannot meet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kv_transfer.plan import IntArray, PairPlan, Part
from kv_transfer.transports.cuda_ipc.copies import StreamCopies
from kv_transfer.transports.cuda_ipc.geometry import Family, Packing, families
from kv_transfer.transports.cuda_ipc.paths import Choice, Path, only
from kv_transfer.transports.cuda_ipc.runtime import Runtime

Bases = tuple[Sequence[int], Sequence[int]]
# Each of two buffers on either device, so that one is filled while the other one is emptied.
STAGE_BYTES = 32 << 20


class Mover(ABC):
    """For one thread; whoever made it closes it when nothing is under way any more."""

    def __init__(self, plan: PairPlan, group_of_layer: Sequence[int], bases: Bases) -> None:
        """
        Args:
            group_of_layer: of each of the plan's layers, the source's group of layers that it is computed with.
            bases: addresses of the source's regions, and of ours.
        """
        self._src_bases, self._dst_bases = bases
        self._plan = plan
        self._group_of_layer = group_of_layer

    @property
    @abstractmethod
    def stream(self) -> int:
        """The one that ends last: an event recorded on it is done when everything enqueued before is in our pool."""

    @abstractmethod
    def enqueue(self, groups: range | None, src_ids: IntArray, dst_ids: IntArray) -> list[Path]:
        """Copy some groups of layers of units, or all of every unit (None); ids are [num_units], and valid."""

    @abstractmethod
    def close(self) -> None: ...

    def _parts(self, groups: range | None) -> Sequence[Part]:
        if groups is None:
            return self._plan.parts
        return [
            part
            for group, (_, parts) in zip(self._group_of_layer, self._plan.layers, strict=True)
            if group in groups
            for part in parts
        ]


class DirectMover(Mover):
    """Our device's kernels address the peer's memory."""

    def __init__(
        self,
        plan: PairPlan,
        group_of_layer: Sequence[int],
        bases: Bases,
        copies: StreamCopies,
        choice: Choice,
    ) -> None:
        """Takes ownership of ``copies``, not of its stream."""
        super().__init__(plan, group_of_layer, bases)
        self._copies, self._choice = copies, choice
        self._families: dict[range | None, Sequence[Family]] = {}

    @property
    def stream(self) -> int:
        return self._copies.stream

    def enqueue(self, groups: range | None, src_ids: IntArray, dst_ids: IntArray) -> list[Path]:
        found = self._families.get(groups)
        if found is None:
            found = families(self._parts(groups), self._plan, self._src_bases, self._dst_bases)
            self._families[groups] = found
        return self._copies.copy(found, src_ids, dst_ids, self._choice)

    def close(self) -> None:
        self._copies.close()


@dataclass(slots=True)
class _Stage:
    """A buffer on either device, and when it was filled and emptied the last time.

    Attributes:
        gather, scatter: by groups of layers.
    """

    there: int
    here: int
    arrived: int
    emptied: int
    gather: dict[range | None, Sequence[Family]] = field(default_factory=dict)
    scatter: dict[range | None, Sequence[Family]] = field(default_factory=dict)


class StagedMover(Mover):
    """Gathers on the source's device, has the driver carry packed pieces through the host, scatters on ours."""

    def __init__(
        self,
        plan: PairPlan,
        group_of_layer: Sequence[int],
        bases: Bases,
        runtime: Runtime,
        copies: tuple[StreamCopies, StreamCopies],
    ) -> None:
        """
        Args:
            copies: on the source's device, and on ours; takes ownership of them, not of their streams.
        """
        super().__init__(plan, group_of_layer, bases)
        self._runtime = runtime
        self._there, self._here = there, here = copies
        self._gathering = Packing(plan, "src", tuple(self._src_bases), is_out=True)
        self._scattering = Packing(plan, "dst", tuple(self._dst_bases), is_out=False)
        self._size = max(STAGE_BYTES, plan.unit_bytes)
        self._stages = [
            _Stage(
                there.allocate(self._size),
                here.allocate(self._size),
                runtime.create_event(there.device),
                runtime.create_event(here.device),
            )
            for _ in range(2)
        ]
        self._next = 0

    @property
    def stream(self) -> int:
        return self._here.stream

    def enqueue(self, groups: range | None, src_ids: IntArray, dst_ids: IntArray) -> list[Path]:
        parts = self._parts(groups)
        unit_bytes = sum(part.num_bytes for part in parts)
        if not unit_bytes:
            return []
        runtime, there, here = self._runtime, self._there, self._here
        kernel = only(there.device, Path.KERNEL)
        most = max(1, self._size // unit_bytes)
        paths = []
        for first in range(0, len(src_ids), most):
            piece = slice(first, first + most)
            stage = self._stages[self._next]
            self._next = 1 - self._next
            if groups not in stage.gather:
                stage.gather[groups] = self._gathering.families(parts, stage.there)
                stage.scatter[groups] = self._scattering.families(parts, stage.here)
            packed = np.arange(len(src_ids[piece]), dtype=np.int64)
            # Not before what the buffer held the last time is out of it; nothing was recorded for the first one.
            runtime.wait(there.stream, stage.emptied)
            paths += there.copy(stage.gather[groups], src_ids[piece], packed, kernel)
            num_bytes = len(packed) * unit_bytes
            runtime.copy_peer((here.device, stage.here), (there.device, stage.there), num_bytes, there.stream)
            runtime.record(there.device, stage.arrived, there.stream)
            runtime.wait(here.stream, stage.arrived)
            here.copy(stage.scatter[groups], packed, dst_ids[piece], kernel)
            runtime.record(here.device, stage.emptied, here.stream)
        return paths

    def close(self) -> None:
        for stage in self._stages:
            self._runtime.destroy_event(stage.arrived)
            self._runtime.destroy_event(stage.emptied)
        self._there.close()
        self._here.close()
