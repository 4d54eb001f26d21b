"""What goes over a connection to Redis: checks, pipelines, scripts, blocking reads.

Every command that goes through ``Connection`` may be repeated without harm (scripts recognise a repetition, outputs are
deduplicated by whoever reads them), so a broken connection is retried until ``redis_timeout_s`` is over.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, cast

from splitwise_sched.coalesce import Coalescer, Command
from splitwise_sched.diagnosis import access_denied, why_unreachable
from splitwise_sched.discovery import COMMAND_TIMEOUT_S, LinkFailed, Servers, servers_of
from splitwise_sched.errors import CommandRefused, Fenced, StoreUnavailable, StoreUnsuitable
from splitwise_sched.keys import PREFILL_GROUP, Keys
from splitwise_sched.records import Claim
from splitwise_sched.resp import ReplyError, pack
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.suitability import SECTIONS, advice, check_server, info_fields
from splitwise_sched.wire import Wire

logger = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MAX_S = 0.02, 0.5
PRELUDE = ("common", "preferred", "waiting_room", "rate")
# Each function that a script begins with costs it a tenth of a microsecond; these run most, and use the least.
PRELUDE_OF = {"step": ("common",), "finish": ("common",), "renew_frontend": ("common",), "lapsed": ("common",)}
SCRIPTS = (
    "submit", "resubmit", "bind", "step", "finish", "give_back", "cancel", "expire", "register", "renew", "drain",
    "reap", "renew_frontend", "lapsed", "orphans", "audit",
)  # fmt: skip

# The server lives, but not for this command: others have the shard, or will.
_LEAVE = ("READONLY", "MASTERDOWN", "CLUSTERDOWN")
# It loads its data, a slot's keys are in two places, its replicas are away.
_STAY = ("LOADING", "TRYAGAIN", "NOREPLICAS")
_PASSING = (*_LEAVE, *_STAY, "MOVED")
_DENIED = ("NOAUTH", "NOPERM", "WRONGPASS")
_ASKING = pack(("ASKING",))


class NotNow(ConnectionError):
    """The server did not do a command, and may later, or another server will.

    Attributes:
        replies: of the pipeline's commands before that one.
    """

    def __init__(self, message: str, replies: list[Any]) -> None:
        super().__init__(message)
        self.replies = replies


def _script_texts() -> dict[str, str]:
    folder = resources.files("splitwise_sched") / "lua"
    texts = {path: (folder / f"{path}.lua").read_text(encoding="utf-8") for path in (*PRELUDE, *SCRIPTS)}
    return {name: "".join(texts[part] for part in (*PRELUDE_OF.get(name, PRELUDE), name)) for name in SCRIPTS}


class Link:
    """One connection that is made when it is needed, and made anew after it broke, to whoever has the shard then."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self._made: Any = None
        self._wire: Wire | None = None
        self._asked: Link | None = None

    async def wire(self) -> Wire:
        """Raises LinkFailed."""
        if self._wire is None or self._wire.lost is not None:
            self.broke()
            connecting = asyncio.ensure_future(self.servers.connect())
            try:
                # redis-py uses asyncio.wait_for, which until Python 3.12 may swallow a cancellation: not ours.
                await asyncio.wait([connecting])
            except asyncio.CancelledError:
                connecting.cancel()
                await asyncio.wait([connecting])
                if not connecting.cancelled() and connecting.exception() is None:
                    connecting.result()._writer.close()
                raise
            # Kept as long as the wire: redis-py closes the transport of a connection that nobody holds.
            self._made = connecting.result()
            self._wire = Wire(self._made._writer.transport)
        return self._wire

    def broke(self) -> None:
        """The connection is of no use any more, nor, perhaps, is the server. Idempotent."""
        if self._wire is not None:
            self.servers.forget()
        self.close()

    def moved(self, error: ReplyError) -> None:
        """The shard is on another server, as "MOVED slot host:port" says."""
        self.close()
        self.servers.moved(_address_in(error, self._host))

    async def asking(self, error: ReplyError) -> Wire:
        """A connection to where "ASK slot host:port" sends one command; the first in it has to be ASKING."""
        address = _address_in(error, self._host)
        if self._asked is None or self._asked.servers.description != address:
            if self._asked is not None:
                self._asked.close()
            self._asked = Link(self.servers.at(address))
        return await self._asked.wire()

    @property
    def _host(self) -> str:
        return getattr(self._made, "host", "")

    def close(self) -> None:
        """Idempotent; the next ``wire`` connects again."""
        if self._wire is not None:
            self._wire.close()
            # The transport is closed, and redis-py would wait for a protocol that is no longer its own.
            self._made._reader = self._made._writer = None
            self._made = self._wire = None
        if self._asked is not None:
            self._asked.close()
            self._asked = None


def _address_in(error: ReplyError, same_host: str) -> str:
    address = str(error).split(" ")[2]
    return f"{same_host}{address}" if address.startswith(":") else address


class Connection:
    """Pipelined commands and scripts on one shard of a topic, from one process and one event loop.

    ``connect`` before anything else; ``close`` frees the connections. Replies raise StoreUnavailable when Redis could
    not be reached for ``redis_timeout_s``.
    """

    def __init__(self, settings: SchedulerSettings, shard: int = 0) -> None:
        self.keys = Keys(settings.scheduler_topic, shard)
        self.server = ""
        self.advice: list[str] = []
        self._settings = settings
        self._servers = servers_of(settings, self.keys)
        self.address = self._servers.description
        # In a slot that is on its way to another node, a script would fail at the first key that has left; whoever
        # declares one that never exists is refused before it has done anything.
        self._guard = (f"{self.keys.prefix}none",) if settings.scheduler_cluster_nodes else ()
        self._link = Link(self._servers)
        self._coalescer = Coalescer(self._send)
        self._texts = _script_texts()
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
        commands: list[tuple[str, ...]] = [("INFO", section) for section in SECTIONS]
        commands += [("SCRIPT", "LOAD", text) for text in self._texts.values()]
        commands += [("HGETALL", self.keys.counters)]
        replies = await self._send([Command(pack(command)) for command in commands])
        for reply in replies:
            if isinstance(cause := getattr(reply, "__cause__", None), ReplyError):
                if cause.code in _DENIED:
                    raise access_denied(self.address, cause) from cause
                raise StoreUnsuitable(f"the server at {self.address} cannot be used: {cause}") from cause
        info = {name: value for text in replies[: len(SECTIONS)] for name, value in info_fields(text).items()}
        self.server = check_server(info, self.address, self._settings)
        self.advice = advice(info, self.address, self._settings)

    async def _reach(self) -> None:
        """Have a connection; only where another server may be about to take over, it is worth while to wait for it."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._settings.redis_timeout_s, RETRY_FIRST_S
        while True:
            try:
                await self._link.wire()
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
        await self._coalescer.close()
        self._link.close()

    def reader(self) -> BlockingReader:
        """A connection of its own for blocking reads; whoever asks for it closes it (async with)."""
        return BlockingReader(self.keys, Link(self._servers))

    async def _send(self, batch: list[Command]) -> list[Any]:
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._settings.redis_timeout_s, RETRY_FIRST_S
        done: list[Any] = []
        while True:
            try:
                replies = await self._send_once(batch[len(done) :] if done else batch)
                return [*done, *replies] if done else replies
            except OSError as exc:
                if isinstance(exc, NotNow):
                    done += exc.replies
                else:
                    self._link.broke()
                if loop.time() + pause > deadline:
                    raise StoreUnavailable(f"Redis at {self.address} does not answer: {exc}") from exc
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX_S)

    async def _send_once(self, batch: list[Command]) -> list[Any]:
        wire = await self._link.wire()
        replies = await _pipeline(wire, batch)
        errors = [i for i, reply in enumerate(replies) if isinstance(reply, ReplyError)]
        if not errors:
            return replies
        unknown = [i for i in errors if replies[i].code == "NOSCRIPT"]
        if unknown:
            await self._load_and_repeat(wire, batch, replies, unknown)
        for i in errors:
            if isinstance(reply := replies[i], ReplyError):
                if reply.code == "ASK":
                    reply = replies[i] = await self._ask(reply, batch[i])
                if isinstance(reply, ReplyError):
                    self._raise_passing(reply, replies[:i])
                    replies[i] = _mapped(reply)
        return replies

    def _raise_passing(self, error: ReplyError, replies: list[Any]) -> None:
        """Raises NotNow for an error that another try may not meet; the next one goes to whoever can do it."""
        code = _passing_code(error)
        if code is None:
            return
        if code == "MOVED":
            self._link.moved(error)
        elif code in _LEAVE:
            self._link.broke()
        raise NotNow(str(error), replies)

    async def _load_and_repeat(self, wire: Wire, batch: list[Command], replies: list[Any], unknown: list[int]) -> None:
        texts = [self._texts[name] for name in {cast(str, batch[i].script) for i in unknown}]
        loads = [Command(pack(("SCRIPT", "LOAD", text))) for text in texts]
        again = await _pipeline(wire, [*loads, *(batch[i] for i in unknown)])
        for i, reply in zip(unknown, again[len(loads) :], strict=True):
            replies[i] = reply

    async def _ask(self, error: ReplyError, command: Command) -> Any:
        """The reply to ``command`` of the node that its slot is on its way to."""
        wire = await self._link.asking(error)
        packed = [_ASKING, command.packed]
        if command.script is not None:
            # That node may not know it yet.
            packed.insert(0, pack(("SCRIPT", "LOAD", self._texts[command.script])))
        binary = [*[False] * (len(packed) - 1), command.binary]
        return (await wire.send(b"".join(packed), binary, COMMAND_TIMEOUT_S))[-1]

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


async def _pipeline(wire: Wire, batch: Sequence[Command]) -> list[Any]:
    packed = b"".join([command.packed for command in batch])
    return await wire.send(packed, [command.binary for command in batch], COMMAND_TIMEOUT_S)


class BlockingReader:
    """Blocking stream reads on a connection of their own; one read at a time."""

    def __init__(self, keys: Keys, link: Link) -> None:
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
                reply = (await wire.send(_ASKING + packed, (False, False), silence_s))[1]
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


def _passing_code(error: ReplyError) -> str | None:
    """The code of an error that goes by; Redis 6.2 wraps that of a command in a script into an error of its own."""
    if error.code in _PASSING:
        return error.code
    text = str(error)
    if error.code == "ERR" and "running script" in text:
        return next((code for code in _PASSING if f"-{code} " in text), None)
    return None


def _mapped(exc: ReplyError) -> Exception:
    text = str(exc)
    if "FENCED" in text:
        return Fenced(text)
    mapped = CommandRefused(f"Redis refused a command: {text}")
    mapped.__cause__ = exc
    return mapped
