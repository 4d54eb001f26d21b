"""What goes over a connection to Redis: checks, pipelines, scripts, blocking reads.

Every command that goes through ``Connection`` may be repeated without harm (scripts recognise a repetition, outputs are
deduplicated by whoever reads them), so a broken connection is retried until ``redis_timeout_s`` is over.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from splitwise_sched.coalesce import Coalescer, Command
from splitwise_sched.diagnosis import access_denied, why_unreachable
from splitwise_sched.dialing import COMMAND_TIMEOUT_S, LinkFailed
from splitwise_sched.discovery import servers_of
from splitwise_sched.errors import Fenced, StoreUnavailable, StoreUnsuitable
from splitwise_sched.keys import PREFILL_GROUP, Keys
from splitwise_sched.lane import ASKING, RETRY_FIRST_S, RETRY_MAX_S, Lane
from splitwise_sched.link import Link
from splitwise_sched.outage import Outage
from splitwise_sched.records import Claim
from splitwise_sched.resp import ReplyError, pack
from splitwise_sched.scripts import script_texts
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.suitability import SECTIONS, advice, check_server, info_fields

logger = logging.getLogger(__name__)

_DENIED = ("NOAUTH", "NOPERM", "WRONGPASS")


class Connection:
    """Pipelined commands and scripts on one shard of a topic, from one process and one event loop.

    ``connect`` before anything else; ``close`` frees the connections. Replies raise StoreUnavailable when Redis could
    not be reached for ``redis_timeout_s``.

    Attributes:
        address: what the settings name.
        server, node, advice: name and version of the server that ``connect`` found, its address, and what its owner
            had better change.
    """

    def __init__(self, settings: SchedulerSettings, shard: int = 0) -> None:
        self.keys = Keys(settings.scheduler_topic, shard)
        self.server, self.node = "", ""
        self.advice: list[str] = []
        limit, shards = settings.scheduler_max_size, settings.scheduler_shards
        self.max_size = limit if limit < 0 else -(-limit // shards)
        self._settings = settings
        self._servers = servers_of(settings, self.keys)
        self.address = self._servers.description
        # In a slot that is on its way to another node, a script would fail at the first key that has left; whoever
        # declares one that never exists is refused before it has done anything.
        self._guard = (f"{self.keys.prefix}none",) if settings.scheduler_cluster_nodes else ()
        self._texts = script_texts()
        self._lane = Lane(Link(self._servers), self._texts, settings.redis_timeout_s)
        self._coalescer = Coalescer(self._lane.send)
        # WAIT holds its connection up: what need not wait has another.
        wait_ms = settings.durability_timeout_ms
        self._wait = Command(pack(("WAIT", 1, wait_ms))) if settings.durability == "wait" else None
        self._waiting_lane = Lane(
            Link(self._servers), self._texts, settings.redis_timeout_s, COMMAND_TIMEOUT_S + wait_ms / 1000
        )
        self._waiting_coalescer = Coalescer(self._send_and_wait)
        self._shas = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._texts.items()}

    # ---- connection ----------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Check that the server can carry the queue, and load the scripts.

        Raises:
            StoreUnavailable: nobody answers.
            StoreUnsuitable: too old, evicting, or access denied.
            ConfigError: TLS does not come about.
        """
        await self._reach()
        # First what INFO says: a server of another kind refuses most of the rest, and for reasons that mislead.
        texts = await self._granted([("INFO", section) for section in SECTIONS])
        info = {name: value for text in texts for name, value in info_fields(text).items()}
        self.node = self._lane.link.peer or self.address
        self.server = check_server(info, self.node, self._settings)
        await self._granted(
            [
                *(("SCRIPT", "LOAD", text) for text in self._texts.values()),
                ("HGETALL", self.keys.counters),
                *([("WAIT", "0", "1")] if self.waits_for_replicas else []),
            ]
        )
        self.advice = advice(info, self.node, self._settings)
        for sentence in self.advice:
            logger.warning("%s", sentence)

    async def _granted(self, commands: Sequence[tuple[str, ...]]) -> list[Any]:
        """Replies to commands, none of which may be refused."""
        replies = await self._lane.send([Command(pack(command)) for command in commands])
        for reply in replies:
            if isinstance(cause := getattr(reply, "__cause__", None), ReplyError):
                if cause.code in _DENIED:
                    raise access_denied(self.address, cause) from cause
                raise StoreUnsuitable(f"the server at {self.address} cannot be used: {cause}") from cause
        return replies

    async def _reach(self) -> None:
        """Have a connection; only where another server may be about to take over, it is worth while to wait for it."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._settings.redis_timeout_s, RETRY_FIRST_S
        while True:
            try:
                await self._lane.link.try_out()
                return
            except OSError as exc:
                is_passing = isinstance(exc, LinkFailed) and exc.is_passing
                if not is_passing or loop.time() + pause > deadline:
                    raise await why_unreachable(exc, self.address, self._settings) from exc
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX_S)

    async def settle(self) -> None:
        """Wait until all that was issued is answered."""
        await self._coalescer.drain()

    async def close(self) -> None:
        for coalescer, lane in ((self._coalescer, self._lane), (self._waiting_coalescer, self._waiting_lane)):
            await coalescer.close()
            lane.link.close()

    def reader(self) -> BlockingReader:
        """A connection of its own for blocking reads; whoever asks for it closes it (async with)."""
        return BlockingReader(self.keys, Link(self._servers))

    async def _send_and_wait(self, batch: list[Command]) -> list[Any]:
        """Replies with how many replicas have what was written, one WAIT for all: [reply, number]."""
        assert self._wait is not None
        *replies, num_replicas = await self._waiting_lane.send([*batch, self._wait])
        if isinstance(num_replicas, Exception):
            raise num_replicas
        return [reply if isinstance(reply, Exception) else [reply, num_replicas] for reply in replies]

    @property
    def waits_for_replicas(self) -> bool:
        return self._wait is not None

    def tell_and_wait(self, *args: Any) -> None:
        """``tell``, in front of a ``script_and_wait``."""
        self._waiting_coalescer.tell(Command(pack(args)))

    def script_and_wait(self, name: str, keys: Sequence[str], *args: Any) -> asyncio.Future[Any]:
        """``script``; its reply, and how many replicas have what it wrote after ``durability_timeout_ms`` at most."""
        return self._waiting_coalescer.call(self._script_command(name, keys, args))

    def call(self, *args: Any, binary: bool = False) -> asyncio.Future[Any]:
        """One command; ``binary`` when its reply is not text."""
        return self._coalescer.call(Command(pack(args), None, binary))

    def tell(self, *args: Any, on_reply: Callable[[Any], None] | None = None) -> None:
        """One command without a future: ``on_reply`` gets its reply or the exception."""
        self._coalescer.tell(Command(pack(args)), on_reply)

    def script(self, name: str, keys: Sequence[str], *args: Any) -> asyncio.Future[Any]:
        """``lua/<name>.lua``; the key prefix goes in front of ``args``."""
        return self._coalescer.call(self._script_command(name, keys, args))

    def tell_script(self, name: str, keys: Sequence[str], *args: Any, on_reply: Callable[[Any], None]) -> None:
        """The same without a future: ``on_reply`` gets the reply or the exception."""
        self._coalescer.tell(self._script_command(name, keys, args), on_reply)

    def _script_command(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Command:
        if self._guard:
            keys = (*keys, *self._guard)
        return Command(pack(("EVALSHA", self._shas[name], len(keys), *keys, self.keys.prefix, *args)), name)


class BlockingReader:
    """Blocking stream reads on a connection of their own; one read at a time.

    Attributes:
        outage: for whoever reads on in spite of failures.
    """

    def __init__(self, keys: Keys, link: Link) -> None:
        self.outage = Outage()
        self._keys = keys
        self._link = link

    async def read(self, positions: Mapping[str, str], block_ms: int, count: int) -> list[tuple[str, str, list[str]]]:
        """XREAD: (key, entry id, [field, value, field, value ...]) of entries after ``positions``, at most ``count`` a
        key; [] when ``block_ms`` went by without one. A field may be there more than once.

        Raises StoreUnavailable at the first failure; positions are the caller's, so that nothing is lost by it.
        """
        args = ("XREAD", "COUNT", count, "BLOCK", block_ms, "STREAMS", *positions, *positions.values())
        return _entries(await self._read(block_ms, args))

    async def claim(self, instance_id: str, count: int, block_ms: int, *, again: bool = False) -> list[Claim]:
        """XREADGROUP on the instance's own queue and the common one.

        ``again`` gives what this instance had claimed before (after a broken connection).

        Raises:
            Fenced: the queue's group is gone (Redis lost its data): register again.
            StoreUnavailable: what this call may have claimed is given by ``again``.
        """
        queues = {self._keys.preferred(instance_id): f"preferred:{instance_id}", self._keys.queue: "queue"}
        args = ("XREADGROUP", "GROUP", PREFILL_GROUP, instance_id, "COUNT", count, "BLOCK", block_ms, "STREAMS",
                *queues, *(("0" if again else ">",) * len(queues)))  # fmt: skip
        claims = []
        for key, entry_id, flat in _entries(await self._read(block_ms, args)):
            fields = as_dict(flat)
            epoch = fields.get("epoch", "")
            if "id" not in fields or not epoch.isdigit():
                # The script that binds it finds no such request, and removes it.
                logger.warning("queue entry %s is not one of ours: %r", entry_id, dict(list(fields.items())[:8]))
            claims.append(Claim(queues[key], entry_id, fields.get("id", ""), int(epoch) if epoch.isdigit() else 0))
        return claims

    async def _read(self, block_ms: int, args: tuple[Any, ...]) -> Any:
        packed, silence_s = pack(args), block_ms / 1000 + COMMAND_TIMEOUT_S
        try:
            wire = await self._link.wire()
            reply = (await wire.send(packed, (False,), silence_s))[0]
            if isinstance(reply, ReplyError) and reply.code == "ASK":
                wire = await self._link.asking(reply)
                reply = (await wire.send(ASKING + packed, (False, False), silence_s))[1]
        except asyncio.CancelledError:
            # A reply may be on its way that would be taken for the next one's.
            self._link.close()
            raise
        except OSError as exc:
            self._link.broke()
            raise StoreUnavailable(f"Redis at {self._link.servers.description} does not answer: {exc}") from exc
        if isinstance(reply, ReplyError):
            if reply.code == "NOGROUP":
                raise Fenced(f"the queue is gone from Redis: {reply}") from reply
            if reply.code == "MOVED":
                self._link.moved(reply)
            else:
                # Perhaps it is the master no longer: whoever is, is asked for.
                self._link.broke()
            raise StoreUnavailable(f"Redis does not let this be read: {reply}") from reply
        self.outage.over()
        return reply

    async def __aenter__(self) -> BlockingReader:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._link.close()


def _entries(reply: Any) -> list[tuple[str, str, list[str]]]:
    """Stream entries out of RESP2's lists or RESP3's map."""
    if not reply:
        return []
    streams = reply.items() if isinstance(reply, dict) else reply
    return [(key, entry_id, fields or []) for key, rows in streams for entry_id, fields in rows]


def as_dict(reply: Any) -> dict[str, str]:
    if isinstance(reply, dict):
        return reply
    it = iter(reply)
    return dict(zip(it, it, strict=False))


async def check(settings: SchedulerSettings) -> list[Connection]:
    """Whether the servers of ``settings`` can carry the topic: each shard's connection, closed, with what was found.

    Raises what ``connect`` raises.
    """
    connections = [Connection(settings, shard) for shard in range(settings.scheduler_shards)]
    try:
        for connection in connections:
            await connection.connect()
    finally:
        for connection in connections:
            await connection.close()
    return connections
