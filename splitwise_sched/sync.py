"""An instance for serving loops that are no coroutines: the session runs in a thread of its own.

The loop calls ``poll`` each time round: it says that it is alive and how much it would take, and gets what came. No
call waits for Redis.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from splitwise_sched.errors import SplitwiseError, StoreUnavailable
from splitwise_sched.instance import InstanceSession
from splitwise_sched.loop_thread import LoopThread
from splitwise_sched.records import InstanceEvent, LeaseLost, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Output, Role

logger = logging.getLogger(__name__)

Load = Mapping[str, int | float | str]

MAX_UNSENT = 100_000
DRAIN_RETRY_S = 0.5
# A wake-up of the I/O thread costs a loop that goes round thousands of times a second more than all else here. So what
# is no news is reported now and then, and after a publish the thread looks again by itself.
REPORT_S = 0.05
LOOK_AGAIN_S = 0.001


class Instance:
    """An instance of a topic, driven by one serving loop in one thread.

    Args:
        on_event: called from the I/O thread when ``poll`` has something new; must return at once (set an event).

    ``start`` begins the I/O thread and registers; ``close`` ends it (``with`` does both). Between them, only the
    serving loop's thread calls the other methods. What they are given is the caller's again when they return, but for
    the outputs themselves, which stay as they are.
    Any of them raises StoreUnavailable when the I/O thread has ended, and TypeError or ValueError when what an earlier
    call gave cannot be put into text; the rest of that call's batch was not sent either.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        registration: Registration,
        on_event: Callable[[], None] | None = None,
    ) -> None:
        self._settings = settings
        self._registration = registration
        self._notify = on_event or (lambda: None)
        self._events: deque[InstanceEvent] = deque()
        # Outputs as they are: no closure for what comes with each step.
        self._commands: deque[Callable[[InstanceSession], None] | tuple[Output, ...]] = deque()
        self._flush_due = False
        self._has_published = False
        self._next_look: asyncio.TimerHandle | None = None
        self._num_unread_prefills = 0
        self._room_said: int | None = None
        self._report_at = 0.0
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: InstanceSession | None = None
        self._thread: LoopThread | None = None
        self._draining: asyncio.Task[None] | None = None
        self._changing: asyncio.Task[None] | None = None
        self._is_drained = False
        self._refused: Exception | None = None

    @property
    def instance_id(self) -> str:
        """Changes when a lease was lost."""
        return self._session.instance_id if self._session is not None else ""

    @property
    def server(self) -> str:
        """Name and version of the server, "" before ``start``."""
        return self._session.store.server if self._session is not None else ""

    @property
    def address(self) -> str:
        """The server, and the shard of several, for people; "" before ``start``."""
        if self._session is None:
            return ""
        shards = self._settings.scheduler_shards
        shard = f", shard {self._session.shard} of {shards}" if shards > 1 else ""
        return f"{self._session.store.node}{shard}"

    def start(self, timeout_s: float = 30.0) -> None:
        """Raises what InstanceSession.start raises; nothing runs on after that."""
        self._thread = LoopThread("splitwise-instance", self._main)
        try:
            self._thread.start(timeout_s)
        except BaseException:
            self._thread = None
            raise

    def close(self, timeout_s: float = 10.0) -> None:
        """Hand back what is held, give up the lease, end the thread. Idempotent."""
        if self._thread is not None:
            self._thread.close(timeout_s)
            self._thread = None

    def __enter__(self) -> Instance:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # ---- the serving loop ----------------------------------------------------------------------------------------

    def poll(self, room: int, load: Load | Callable[[], Load]) -> list[InstanceEvent]:
        """Once each time round: what came since the last call.

        Args:
            room: how many more prompts the engine would take now.
            load: readable figures for the lease record; looked at now and then.
        """
        self._raise_refused()
        events: list[InstanceEvent] = []
        if self._events:
            with self._lock:
                events += self._events
                self._events.clear()
                self._num_unread_prefills = 0
        now = time.monotonic()
        if events or room != self._room_said or now >= self._report_at:
            self._room_said, self._report_at = room, now + REPORT_S
            figures = dict(load() if callable(load) else load)
            self._do(lambda session: self._report(session, room, figures))
        return events

    def publish(self, outputs: Sequence[Output]) -> None:
        """See InstanceSession.publish. Tokens between a request's first and its last may wait for 1 to 2 ms."""
        if outputs:
            is_urgent = False
            for output in outputs:
                if output.index == 0 or output.finish_reason is not None:
                    is_urgent = True
            self._do(tuple(outputs), is_urgent)

    def step(self, request_id: str, epoch: int, notes: Mapping[str, float | int | str]) -> None:
        """See InstanceSession.step."""
        noted = dict(notes)
        self._do(lambda session: session.step(request_id, epoch, noted))

    def release(self, request_id: str, epoch: int) -> None:
        """See InstanceSession.release."""
        self._do(lambda session: session.release(request_id, epoch))

    def give_back(self, request_id: str, epoch: int, why: str, *, retry: bool, pair_failed: bool = False) -> None:
        """See InstanceSession.give_back."""
        self._do(lambda session: session.give_back(request_id, epoch, why, retry=retry, pair_failed=pair_failed))

    def drain(self) -> None:
        """Take nothing more; what is held goes on to its end, which ``is_drained`` tells.

        Idempotent; any thread or signal handler may call this.
        """

        def begin(session: InstanceSession) -> None:
            if self._changing is not None:
                self._changing.cancel()
            if self._draining is None:
                self._draining = asyncio.get_running_loop().create_task(self._drain(session))

        self._do(begin)

    @property
    def is_drained(self) -> bool:
        """``drain`` was called, nothing more can come, and all that was held has ended, also in Redis."""
        return self._is_drained

    def change_role(self, role: Role, timeout_s: float) -> None:
        """See InstanceSession.change_role; ``LeaseLost`` comes when it is done. Any thread may call this."""

        def begin(session: InstanceSession) -> None:
            if self._draining is None:
                self._changing = asyncio.get_running_loop().create_task(session.change_role(role, timeout_s))

        self._do(begin)

    @property
    def num_pairs_avoided(self) -> int:
        """Times that this instance told of a transfer after which its pair was avoided for a while."""
        return self._session.num_pairs_avoided if self._session is not None else 0

    @property
    def avoided_pairs(self) -> list[tuple[str, str]]:
        """See InstanceSession.avoided_pairs; any thread may ask."""
        return self._session.avoided_pairs if self._session is not None else []

    @property
    def num_held(self) -> int:
        """Runs that were assigned here and have not ended."""
        return self._session.num_held if self._session is not None else 0

    # ---- between the threads -------------------------------------------------------------------------------------

    async def _drain(self, session: InstanceSession) -> None:
        while not self._is_drained:
            try:
                await session.drain()
                await session.until_empty()
                self._is_drained = True
            except SplitwiseError as exc:
                logger.warning("draining goes on when Redis answers again: %s", exc)
                await asyncio.sleep(DRAIN_RETRY_S)

    def _report(self, session: InstanceSession, room: int, load: Mapping[str, int | float | str]) -> None:
        session.alive(load)
        with self._lock:
            unread = self._num_unread_prefills
        session.set_room(room - unread)

    def _do(self, command: Callable[[InstanceSession], None] | tuple[Output, ...], is_urgent: bool = True) -> None:
        if self._refused is not None:
            self._raise_refused()
        if len(self._commands) >= MAX_UNSENT:
            raise StoreUnavailable(f"{MAX_UNSENT} commands wait for the I/O thread: it has stopped")
        self._commands.append(command)
        if self._loop is None or self._flush_due:
            return
        # The thread takes its promise back before it looks, so that this command is seen by it, or the promise gone.
        if is_urgent or self._next_look is None or self._loop.is_closed():
            self._flush_due = True
            try:
                self._loop.call_soon_threadsafe(self._flush)
            except RuntimeError as exc:
                self._flush_due = False
                raise StoreUnavailable("the scheduler's I/O thread has ended") from exc

    def _raise_refused(self) -> None:
        if self._refused is not None:
            refused, self._refused = self._refused, None
            raise refused

    def _look_again(self) -> None:
        self._next_look = None
        self._flush()

    def _flush(self) -> None:
        self._flush_due = False
        session = self._session
        while self._commands and session is not None:
            try:
                command = self._commands.popleft()
                if isinstance(command, tuple):
                    self._has_published = True
                    session.publish(command)
                else:
                    command(session)
            except (TypeError, ValueError) as exc:
                # An output that cannot be encoded: the thread that made it is the one to hear of it.
                self._refused = exc
        if self._has_published and self._next_look is None and self._loop is not None:
            self._has_published = False
            self._next_look = self._loop.call_later(LOOK_AGAIN_S, self._look_again)

    def _on_event(self, event: InstanceEvent) -> None:
        with self._lock:
            if isinstance(event, LeaseLost):
                # What was assigned before is no longer this instance's.
                self._events.clear()
                self._num_unread_prefills = 0
            self._events.append(event)
            self._num_unread_prefills += isinstance(event, PrefillAssigned)
        self._notify()

    async def _main(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        session = InstanceSession(self._settings, self._registration, self._on_event)
        await session.start()
        self._session = session
        self._loop = asyncio.get_running_loop()
        ready()
        self._flush()
        try:
            await stop.wait()
            self._flush()
            for task in (self._draining, self._changing):
                if task is not None:
                    task.cancel()
        finally:
            await session.close()
