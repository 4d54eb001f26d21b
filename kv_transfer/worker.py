"""Who does a messenger's work, and when: its own thread, or whoever has just asked for something.

Two queues, of commands from outside and of events from transports, and a lock: whoever holds it works off everything
that is there. The thread waits for peers and the clock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from kv_transfer.checker import Checked, CheckEvent, Signed
from kv_transfer.control import ControlChannel, Incoming, Source
from kv_transfer.destination import DestinationSide
from kv_transfer.errors import MessengerClosed
from kv_transfer.options import TransferOptions
from kv_transfer.reactor import Reactor
from kv_transfer.source import SourceSide
from kv_transfer.transports.base import LaneEvent, Revoked

_TICK_S = 0.1
# A transfer that is opened while nothing else was under way waits so long for its first look at the clock.
_IDLE_WAIT_S = 0.25
# A pause of our own of this length is not the peers' silence: they may have stood still as well, or been unheard.
_OWN_STALL_S = 0.5
_CLOSE_TIMEOUT_S = 15.0

Command = Callable[[float], None]


class Worker:
    """Owns the reactor, the control channel and the thread, from ``start`` on."""

    def __init__(self, name: str, options: TransferOptions, on_turn_end: Callable[[], None]) -> None:
        """
        Args:
            on_turn_end: called after each turn, in whichever thread has done it, without the lock.
        """
        self._name, self._options, self._on_turn_end = name, options, on_turn_end
        self._commands: deque[Command] = deque()
        self._lane_events: deque[LaneEvent | CheckEvent] = deque()
        self._lock = threading.Lock()
        # Whoever holds it does the work; nobody waits for it but the thread.
        self._turn_lock = threading.Lock()
        self._turn_of = 0
        self._is_running = self._is_open = self._is_busy = False
        self._last_tick = time.monotonic()
        self._thread: threading.Thread | None = None

    def start(
        self,
        reactor: Reactor,
        control: ControlChannel,
        source: SourceSide,
        destination: DestinationSide,
        let_go: Callable[[], None],
    ) -> None:
        """Begin to work. Once.

        Args:
            let_go: called once when the work is over and before the connections are closed, with the lock.
        """
        self._reactor, self._control = reactor, control
        self._source, self._destination, self._let_go = source, destination, let_go
        self._is_running = self._is_open = True
        self._thread = threading.Thread(target=self._run, name=f"kv-messenger-{self._name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort what is open, wait for live peers to stop reading, let go of everything. Idempotent."""
        with self._lock:
            was_running, self._is_running = self._is_running, False
        if was_running:
            self._reactor.wake()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def submit(self, command: Command) -> None:
        """Have something done at once. Raises MessengerClosed when it never will be."""
        with self._lock:
            if not self._is_running:
                raise MessengerClosed(self._name)
            self._commands.append(command)
        self._work_or_wake()

    def post(self, event: LaneEvent | CheckEvent) -> None:
        """Take an event of a transport or the checker, in whichever thread."""
        self._lane_events.append(event)
        self._work_or_wake()

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """Keep everybody else from working; whether there is work at all."""
        with self._turn_lock:
            yield self._is_open

    def _work_or_wake(self) -> None:
        """Do what was just put on a queue, here and now, unless somebody is at work: then he is told of it."""
        if self._turn_of == threading.get_ident() or not self._is_open:
            # This very thread is at work, further up the stack, and looks at the queues before it ends.
            return
        if not self._turn_lock.acquire(blocking=False):
            self._reactor.wake()
            return
        try:
            self._turn_of = threading.get_ident()
            if self._is_open:
                self._work_off()
        finally:
            self._turn_of = 0
            self._turn_lock.release()
        self._on_turn_end()

    @contextlib.contextmanager
    def _own_turn(self) -> Iterator[None]:
        with self._turn_lock:
            self._turn_of = threading.get_ident()
            try:
                yield
            finally:
                self._turn_of = 0

    def _run(self) -> None:
        try:
            while self._is_running:
                self._wait_and_work()
            with self._own_turn():
                self._source.abort_all("the messenger was closed", time.monotonic())
                self._destination.abort_all("the messenger was closed")
            give_up = time.monotonic() + self._options.drain_s + 1.0
            while (self._source.num_open or self._destination.num_open) and time.monotonic() < give_up:
                self._wait_and_work()
        finally:
            with self._lock:
                self._is_running = False
            with self._own_turn():
                self._is_open = False
                try:
                    self._let_go()
                finally:
                    self._control.close()
                    self._reactor.close("the messenger was closed")
            self._on_turn_end()

    def _wait_and_work(self) -> None:
        """One round of the thread."""
        tick_s = min(_TICK_S, self._options.heartbeat_s / 4)
        was_busy = self._is_busy
        found = self._reactor.wait(tick_s if was_busy else _IDLE_WAIT_S)
        with self._own_turn():
            self._reactor.dispatch(found)
            self._work_off()
            now = time.monotonic()
            if now - self._last_tick >= tick_s:
                self._tick(now, now - self._last_tick if was_busy else 0.0)
                self._work_off()
            # Whether the clock matters.
            self._is_busy = self._source.is_waiting or self._destination.is_waiting or self._control.has_strangers
        self._on_turn_end()

    def _tick(self, now: float, paused_s: float) -> None:
        self._last_tick = now
        if paused_s > _OWN_STALL_S:
            self._source.sessions.forgive(paused_s)
            self._destination.forgive(paused_s)
        self._source.tick(now)
        self._destination.tick(now)
        self._reactor.tick(now)

    def _work_off(self) -> None:
        """Everything that is on a queue, and what comes of it."""
        control = self._control
        while True:
            for one in control.take():
                self._hear(one, time.monotonic())
            while self._commands:
                self._commands.popleft()(time.monotonic())
            while self._lane_events:
                self._take(self._lane_events.popleft(), time.monotonic())
            self._reactor.flush()
            if not control.has_incoming and not self._commands and not self._lane_events:
                return

    def _hear(self, incoming: Incoming, now: float) -> None:
        if incoming.source is Source.SESSION:
            self._source.sessions.receive(incoming.key, incoming.frame, now)
        elif incoming.source is Source.PEER:
            self._destination.receive(incoming.key, incoming.frame, now)
        else:
            self._source.sessions.lose(incoming.key, incoming.reason, now)
            self._destination.lose(incoming.key, incoming.reason)

    def _take(self, event: LaneEvent | CheckEvent, now: float) -> None:
        if isinstance(event, Revoked):
            self._source.revoked(event.transport, event.token, now)
        elif isinstance(event, Signed):
            self._source.signed(event, now)
        elif isinstance(event, Checked):
            self._destination.checked(event)
        else:
            self._destination.take(event, now)
