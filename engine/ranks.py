"""All TP ranks of an instance as one end of a transfer: it is done when every rank's part is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kv_transfer.endpoint import RankEndpoint
from kv_transfer.events import Received, Sent, TransferEvent, TransferFailed, TransferStats
from kv_transfer.lanes import LaneReport
from kv_transfer.messenger import Messenger
from kv_transfer.options import TransferOptions
from kv_transfer.pool import BlockPool


@dataclass
class _Parts:
    """What the ranks have reported of one transfer."""

    missing: set[int]
    failure: TransferFailed | None = None
    aux: bytes = b""
    stats: list[TransferStats] = field(default_factory=list)


class RankGroup:
    """One messenger a pool, in rank order. ``start`` before, ``close`` after everything else."""

    def __init__(
        self, pools: Sequence[BlockPool], options: TransferOptions, *, name: str, on_event: Callable[[], None]
    ) -> None:
        self._messengers = [
            Messenger(pool, _of_rank(options, rank), name=name, on_event=on_event) for rank, pool in enumerate(pools)
        ]
        self._parts: dict[str, _Parts] = {}

    def start(self) -> None:
        started = []
        try:
            for messenger in self._messengers:
                messenger.start()
                started.append(messenger)
        except BaseException:
            for messenger in started:
                messenger.close()
            raise

    def close(self) -> None:
        for messenger in self._messengers:
            messenger.close()

    @property
    def endpoints(self) -> list[RankEndpoint]:
        return [messenger.endpoint for messenger in self._messengers]

    def open_send(self, transfer_id: str, *, num_blocks: int, deadline_s: float) -> None:
        self._open(transfer_id)
        for messenger in self._messengers:
            messenger.open_send(transfer_id, num_blocks=num_blocks, deadline_s=deadline_s)

    def send_blocks(self, transfer_id: str, first_index: int, block_ids: Sequence[int]) -> None:
        for messenger in self._messengers:
            messenger.send_blocks(transfer_id, first_index, block_ids)

    def finish_send(self, transfer_id: str, aux: bytes) -> None:
        for messenger in self._messengers:
            messenger.finish_send(transfer_id, aux)

    def open_receive(
        self, transfer_id: str, source: Sequence[RankEndpoint], block_ids: Sequence[int], *, deadline_s: float
    ) -> None:
        self._open(transfer_id)
        for messenger in self._messengers:
            messenger.open_receive(transfer_id, source, block_ids, deadline_s=deadline_s)

    def connect(self, source: Sequence[RankEndpoint]) -> None:
        """Begin to reach a source that transfers will come from; costs next to nothing where that was done before."""
        for messenger in self._messengers:
            messenger.connect(source)

    def abort(self, transfer_id: str, reason: str) -> None:
        """``TransferFailed`` follows when no rank's blocks are in use any more. Nothing happens to unknown ones."""
        if transfer_id in self._parts:
            for messenger in self._messengers:
                messenger.abort(transfer_id, reason)

    def poll(self) -> list[TransferEvent]:
        """Ends of transfers, each once: after the last rank's."""
        ended = []
        for rank, messenger in enumerate(self._messengers):
            for event in messenger.poll():
                if (combined := self._combine(rank, event)) is not None:
                    ended.append(combined)
        return ended

    def lanes(self) -> list[LaneReport]:
        """What the ranks are connected to, rank by rank."""
        return [report for messenger in self._messengers for report in messenger.lanes()]

    def counters(self) -> Mapping[str, int | float]:
        """Sums over the ranks."""
        total: dict[str, int | float] = {}
        for messenger in self._messengers:
            for name, value in messenger.counters().items():
                total[name] = total.get(name, 0) + value
        return total

    def _open(self, transfer_id: str) -> None:
        self._parts[transfer_id] = _Parts(missing=set(range(len(self._messengers))))

    def _combine(self, rank: int, event: TransferEvent) -> TransferEvent | None:
        parts = self._parts.get(event.transfer_id)
        if parts is None:
            return None
        parts.missing.discard(rank)
        if isinstance(event, TransferFailed):
            if parts.failure is None:
                parts.failure = event
                for other in parts.missing:
                    self._messengers[other].abort(event.transfer_id, f"rank {rank}: {event.reason}")
        else:
            parts.stats.append(event.stats)
            if isinstance(event, Received):
                parts.aux = parts.aux or event.aux
        if parts.missing:
            return None
        del self._parts[event.transfer_id]
        if parts.failure is not None:
            return parts.failure
        stats = TransferStats(
            num_bytes=sum(s.num_bytes for s in parts.stats),
            seconds=max(s.seconds for s in parts.stats),
            lane="+".join(dict.fromkeys(s.lane for s in parts.stats)),
            num_blocks=sum(s.num_blocks for s in parts.stats),
        )
        if isinstance(event, Sent):
            return Sent(event.transfer_id, stats)
        return Received(event.transfer_id, parts.aux, stats)


def _of_rank(options: TransferOptions, rank: int) -> TransferOptions:
    """Ports that were named are the first rank's; each one after it takes the next."""
    control_port, data_port = (port + rank if port else 0 for port in (options.control_port, options.data_port))
    return replace(options, control_port=control_port, data_port=data_port)
