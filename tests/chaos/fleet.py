"""The processes of a run: started, killed, stopped and woken by their pids, replaced under their names."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.channel import Hub
from tests.chaos.spec import INSTANCE_ROLES, ChildSpec
from tests.chaos.zygote import Zygote

START_TIMEOUT_S = 60.0
LINK = "link"
ROOT = Path(__file__).resolve().parents[2]
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Sample:
    """How a process was at a time; tasks and held are what it says itself."""

    at: float
    rss_bytes: int
    num_fds: int
    num_tasks: int
    num_held: int


@dataclass
class Member:
    """One process under its name.

    Attributes:
        is_spared: faults aimed at processes pass it by.
        gone: set when it has ended, and everything that it had said was heard.
        instance_id: the last that it registered under.
    """

    name: str
    role: str
    generation: int
    is_spared: bool
    pid: int
    ready: asyncio.Future[None]
    gone: asyncio.Future[None]
    instance_id: str | None = None
    is_leaving: bool = False
    is_stopped: bool = False
    status: int | None = None
    stats: tuple[int, int] = (0, 0)
    samples: list[Sample] = field(default_factory=list)

    @property
    def is_up(self) -> bool:
        return not self.gone.done()

    @property
    def is_instance(self) -> bool:
        return self.role in INSTANCE_ROLES

    def signal(self, number: int) -> None:
        if self.is_up:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass  # it has just ended

    def sample(self) -> None:
        try:
            rss_pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            num_fds = len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return  # it has just ended
        self.samples.append(Sample(time.monotonic(), rss_pages * PAGE_BYTES, num_fds, *self.stats))


class Fleet:
    """All processes of a run.

    Args:
        settings_of: by name, the SchedulerSettings of a process.
        on_event: of what processes say, what is not about themselves: (member, event).
    """

    def __init__(
        self,
        folder: Path,
        template: dict[str, Any],
        settings_of: Callable[[str], dict[str, Any]],
        on_event: Callable[[Member, list[Any]], None],
    ) -> None:
        self.folder = folder
        self.members: dict[str, Member] = {}
        self.past: list[Member] = []
        self.ports: dict[str, int] = {}
        self._template = template
        self._settings_of = settings_of
        self._on_event = on_event
        self._hub = Hub(str(folder / "hub"), self._hear, self._lose)
        self._zygote = Zygote(self._ended)
        self._sampling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Fleet:
        await self._hub.start()
        await self._zygote.start(str(ROOT))
        self._sampling = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._sampling is not None:
            self._sampling.cancel()
        for member in self.members.values():
            member.signal(signal.SIGKILL)
        ended = [m.gone for m in self.members.values()]
        if ended:
            await asyncio.wait(ended, timeout=10)
        await self._zygote.close()
        self._hub.close()

    def up(self, *roles: str) -> list[Member]:
        """Those that run or are stopped, in the order of their names."""
        found = [m for m in self.members.values() if m.is_up and (not roles or m.role in roles)]
        return sorted(found, key=lambda m: m.name)

    async def spawn(self, name: str, role: str, *, is_spared: bool = False, clock_offset_s: int = 0) -> Member:
        """Returns when there is a process; ``ready`` of the member tells when it has started."""
        before = self.members.get(name)
        assert before is None or not before.is_up, f"{name} is still there"
        if before is not None:
            self.past.append(before)
        settings = self._settings_of(name)
        spec = ChildSpec(
            name=name, role=role, generation=0 if before is None else before.generation + 1, hub=self._hub.path,
            log=str(self.folder / f"{name}.log"), settings=settings, clock_offset_s=clock_offset_s, **self._template,
        )  # fmt: skip
        loop = asyncio.get_running_loop()

        def forked(pid: int) -> Member:
            member = Member(name, role, spec.generation, is_spared, pid, loop.create_future(), loop.create_future())
            self.members[name] = member
            return member

        return await self._zygote.fork(spec.to_json(), forked)

    async def started(self, *members: Member) -> None:
        await asyncio.wait_for(asyncio.gather(*(m.ready for m in members)), START_TIMEOUT_S)

    def command(self, member: Member, *command: Any) -> None:
        self._hub.command(member.name, member.pid, *command)

    async def close(self, members: list[Member], timeout_s: float) -> list[str]:
        """Have them close as they would in service; what went wrong with it."""
        for member in members:
            self.command(member, "close")
        ended = [m.gone for m in members]
        if ended:
            await asyncio.wait(ended, timeout=timeout_s)
        return [f"{m.name} did not close within {timeout_s:g} s" for m in members if m.is_up]

    def _hear(self, name: str, event: list[Any]) -> None:
        member = self.members[name]
        kind = event[0]
        if kind == "ready":
            if not member.ready.done():
                member.ready.set_result(None)
        elif kind == "stats":
            member.stats = (event[1], event[2])
        elif kind == "registered":
            member.instance_id = event[1]
        elif kind == "ports":
            self.ports = event[1]
        self._on_event(member, event)

    def _lose(self, name: str, pid: int) -> None:
        for member in (self.members[name], *self.past):
            if member.pid == pid and not member.gone.done():
                member.gone.set_result(None)
                if not member.ready.done():
                    member.ready.set_exception(RuntimeError(f"{name} ended at its start: see {self.folder}"))
                    member.ready.exception()

    def _ended(self, pid: int, status: int) -> None:
        for member in self.members.values():
            if member.pid == pid:
                member.status = status
                if not self._hub.knows(member.name, pid):
                    self._lose(member.name, pid)

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for member in self.up():
                member.sample()
