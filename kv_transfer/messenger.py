"""One TP rank's messenger: what an engine's runner calls."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from kv_transfer.checker import Checker
from kv_transfer.control import ControlChannel
from kv_transfer.counters import Counters
from kv_transfer.destination import DestinationSide
from kv_transfer.endpoint import Offer, RankEndpoint
from kv_transfer.errors import InvalidOptions, InvalidTransfer, MessengerClosed, PoolNotServed, TransportFailed
from kv_transfer.events import TransferEvent, TransferFailed
from kv_transfer.identity import ProcessIdentity
from kv_transfer.lanes import LaneReport
from kv_transfer.layout import MAX_NAME_CHARS
from kv_transfer.leases import LeaseTable
from kv_transfer.options import TransferOptions
from kv_transfer.parts import MessengerParts
from kv_transfer.pool import BlockPool
from kv_transfer.protocol import MAX_AUX_BYTES, WIRE_VERSION
from kv_transfer.reactor import Reactor
from kv_transfer.source import SourceSide
from kv_transfer.tickets import ReceiveTicket, SendTicket, TicketBook
from kv_transfer.transports.base import Transport
from kv_transfer.transports.registry import load_transports
from kv_transfer.worker import Command, Worker

log = logging.getLogger("kv_transfer")


class Messenger:
    """Moves KV blocks between this rank's pool and those of other instances.

    Life of a transfer on the source: ``open_send``, ``send_blocks`` as chunks are computed, ``finish_send``, then
    ``poll`` yields Sent or TransferFailed. On the destination: ``open_receive``, then Received or TransferFailed. The
    two sides may come in either order; an id is used once. Exactly one final event per transfer and side; until it was
    polled the blocks belong to the transfer.

    All methods return at once and may be called from any one thread. Small work is done in the call itself, where
    nobody else is at it just then; everything else in threads of the messenger. Whoever made it closes it, before the
    pool.
    """

    def __init__(
        self, pool: BlockPool, options: TransferOptions, *, name: str, on_event: Callable[[], None] | None = None
    ) -> None:
        """
        Args:
            name: of the instance, for people.
            on_event: called when ``poll`` has something new, from a thread of the messenger or within a call of the
                caller's own; must not wait, nor raise.
        Raises:
            InvalidOptions: the name is empty, too long or not printable.
            UnknownTransport: a name in ``options.protocols`` is not installed.
        """
        if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise InvalidOptions("name", f"is {name[:80]!r}: give 1 to {MAX_NAME_CHARS} printable characters")
        self.name = name
        self._pool, self._options, self._on_event = pool, options, on_event
        self._transport_classes = load_transports(options.protocols, is_on_device=pool.is_on_device)
        self._counters = Counters()
        self._leases = LeaseTable(pool.layout.num_blocks)
        self._tickets = TicketBook(options.max_inflight)
        self._events: deque[TransferEvent] = deque()
        self._lock = threading.Lock()
        self._has_news = False
        self._worker = Worker(name, options, self._tell_news)
        self._checker = Checker(self._worker.post)
        self._transports: list[Transport] = []
        self._endpoint: RankEndpoint | None = None

    @property
    def endpoint(self) -> RankEndpoint:
        """How peers reach this rank; from ``start`` on."""
        if self._endpoint is None:
            raise MessengerClosed(self.name)
        return self._endpoint

    def start(self) -> None:
        """Listen, and begin to work. Once.

        Raises:
            TransportFailed: an address cannot be listened on, or a transport does not work on this host.
        """
        if self._endpoint is not None:
            raise MessengerClosed(self.name)
        options, worker = self._options, self._worker
        reactor = Reactor()
        try:
            control = ControlChannel(reactor, options.bind_host, options.control_port)
            offers: dict[str, Offer] = {}
            for cls in self._transport_classes:
                transport = cls(self._pool, options, self._leases, worker.post)
                self._transports.append(transport)
                transport.attach(reactor)
                self._offer(transport, offers)
            if not offers:
                raise PoolNotServed(
                    f"none of {', '.join(options.protocols)} can serve this pool to peers; name tcp as well"
                )
        except BaseException:
            self._close_transports()
            reactor.close("the messenger could not start")
            raise
        self._endpoint = own = RankEndpoint(
            name=self.name,
            host=options.public_host,
            control_port=control.port,
            nonce=secrets.token_hex(16),
            process=ProcessIdentity.own(),
            layout=self._pool.layout,
            wire_version=WIRE_VERSION,
            transports=offers,
        )
        parts = MessengerParts(
            own=own,
            pool=self._pool,
            options=options,
            control=control,
            leases=self._leases,
            transports=tuple(self._transports),
            checker=self._checker,
            counters=self._counters,
            report=self._report,
        )
        self._source, self._destination = SourceSide(parts), DestinationSide(parts)
        worker.start(reactor, control, self._source, self._destination, self._let_go)

    def _offer(self, transport: Transport, offers: dict[str, Offer]) -> None:
        try:
            offers[transport.name] = transport.offer()
        except PoolNotServed as exc:
            self._counters.add("not_served_total")
            log.warning("peers cannot fetch KV from %s by %s: %s", self.name, transport.name, exc)
        except TransportFailed as exc:
            self._do_without(transport, exc)

    def close(self) -> None:
        """Abort what is open (its TransferFailed can still be polled), and let go of everything. Idempotent.

        Takes as long as live peers need to stop reading, ``drain_s`` at most, and about a second on top.
        """
        self._worker.stop()

    def open_send(self, transfer_id: str, *, num_blocks: int, deadline_s: float) -> None:
        """Announce that this rank will have blocks for a transfer; a destination may have reserved before.

        Args:
            deadline_s: from now to its end; then it fails.
        Raises:
            InvalidTransfer: the id is in use, or there are too many open transfers.
        """
        ticket = SendTicket(transfer_id, num_blocks)
        self._tickets.open_send(ticket, deadline_s)
        self._submit_opening(transfer_id, lambda now: self._source.open(transfer_id, num_blocks, deadline_s, now))

    def send_blocks(self, transfer_id: str, first_index: int, block_ids: Sequence[int]) -> None:
        """Blocks ``first_index`` onward of the transfer are complete in the pool, and stay as they are until its end.

        Raises:
            InvalidTransfer: the transfer was not opened, or its event was polled; blocks that do not exist, or twice.
        """
        ids = self._tickets.send(transfer_id).take(first_index, block_ids, self._pool.layout.num_blocks)
        self._pool.before_send(ids)
        self._worker.submit(lambda now: self._source.offer(transfer_id, first_index, ids))

    def finish_send(self, transfer_id: str, aux: bytes) -> None:
        """All blocks were given.

        Args:
            aux: goes to the destination with the end: first token, logprobs. At most 1 MiB.
        Raises:
            InvalidTransfer: blocks are missing, aux is too long, or it was called before.
        """
        if len(aux) > MAX_AUX_BYTES:
            raise InvalidTransfer(transfer_id, f"aux has {len(aux)} bytes; the limit is {MAX_AUX_BYTES}")
        self._tickets.send(transfer_id).finish()
        self._worker.submit(lambda now: self._source.finish(transfer_id, bytes(aux)))

    def open_receive(
        self, transfer_id: str, source: Sequence[RankEndpoint], block_ids: Sequence[int], *, deadline_s: float
    ) -> None:
        """Fetch a transfer's blocks into this rank's pool as they get ready at the source.

        Args:
            source: the endpoints of all TP ranks of the source instance.
            block_ids: where the blocks go, in the transfer's order; from now to the event the messenger writes them.
                ``NOT_WANTED`` in the place of one that is here already, such as those of a cached prefix.
            deadline_s: from now to its end; then it fails.
        Raises:
            InvalidTransfer: the id is in use, blocks do not exist or are named twice, no source, too many transfers.
        """
        if not source:
            raise InvalidTransfer(transfer_id, "no source was given")
        endpoints = tuple(source)
        ticket = ReceiveTicket(transfer_id, block_ids, self._pool.layout.num_blocks)
        self._tickets.open_receive(ticket, deadline_s)
        checked_ids = ticket.block_ids
        self._pool.before_receive()
        self._submit_opening(
            transfer_id, lambda now: self._destination.open(transfer_id, endpoints, checked_ids, deadline_s, now)
        )

    def connect(self, source: Sequence[RankEndpoint]) -> None:
        """Begin to reach a source before there is a transfer, so that the first one does not wait for it.

        What stands in the way is logged here, and reported by the first transfer.

        Args:
            source: the endpoints of all TP ranks of the source instance.
        Raises:
            InvalidTransfer: no source.
        """
        if not source:
            raise InvalidTransfer("", "no source was given")
        endpoints = tuple(source)
        self._worker.submit(lambda now: self._destination.connect(endpoints, now))

    def abort(self, transfer_id: str, reason: str) -> None:
        """Give a transfer up, whichever side of it is here; TransferFailed follows. Does nothing when it has ended."""

        def act(now: float) -> None:
            self._source.abort(transfer_id, reason, "", now)
            self._destination.abort(transfer_id, reason, "")

        self._worker.submit(act)

    def poll(self) -> list[TransferEvent]:
        """What has ended since the last call; never waits. Works after ``close`` as well."""
        if not self._events:
            return []
        with self._lock:
            found = list(self._events)
            self._events.clear()
            for event in found:
                self._tickets.close(event.transfer_id)
        return found

    def counters(self) -> Mapping[str, int | float]:
        """Plain counts since the start, and ``transfers_open``; see ``kv_transfer.counters``."""
        values = self._counters.snapshot()
        values["transfers_open"] = len(self._tickets)
        for transport in self._transports:
            for key, value in transport.counters().items():
                values[f"{transport.name}_{key}_total"] = value
        return values

    def lanes(self) -> list[LaneReport]:
        """The sources that this rank is connected to, and over what; waits for the work of a moment."""
        with self._worker.turn() as is_alive:
            return self._destination.lanes(time.monotonic()) if is_alive else []

    def __enter__(self) -> Messenger:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _submit_opening(self, transfer_id: str, command: Command) -> None:
        try:
            self._worker.submit(command)
        except MessengerClosed:
            self._tickets.close(transfer_id)
            raise

    def _report(self, event: TransferEvent) -> None:
        with self._lock:
            self._events.append(event)
        self._has_news = True

    def _tell_news(self) -> None:
        """After a turn, when everything was sent that it had to say."""
        if self._has_news and self._on_event is not None:
            self._has_news = False
            self._on_event()

    def _let_go(self) -> None:
        """The last turn. After it nothing of ours touches the pool, whatever the transfers' states."""
        self._close_transports()
        self._report_unfinished()

    def _report_unfinished(self) -> None:
        """Fail what has no event yet: peers that were not waited for any longer, and calls that came too late."""
        with self._lock:
            ended = {event.transfer_id for event in self._events}
            unfinished = [i for i in self._tickets.open_ids() if i not in ended]
        for transfer_id in unfinished:
            self._report(TransferFailed(transfer_id, "the messenger was closed", ""))

    def _do_without(self, transport: Transport, exc: TransportFailed) -> None:
        """This host does not have a lane; raises where it must."""
        if transport.name not in self._options.optional:
            raise exc
        self._transports.remove(transport)
        transport.close()
        self._counters.add("lanes_missing_total")
        log.error("KV transfer goes on without %s, over %s: %s", transport.name, self._others(transport), exc)

    def _others(self, transport: Transport) -> str:
        return ", ".join(cls.name for cls in self._transport_classes if cls.name != transport.name) or "nothing"

    def _close_transports(self) -> None:
        for transport in self._transports:
            transport.close()
        self._checker.close()
