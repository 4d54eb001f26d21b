"""The only module that imports redis: connection, checks, pipelines, scripts, blocking reads.

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

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,
    NoPermissionError,
    RedisError,
    TimeoutError,
)

from splitwise_sched.coalesce import Coalescer, Command
from splitwise_sched.errors import CommandRefused, ConfigError, Fenced, StoreUnavailable, StoreUnsuitable
from splitwise_sched.keys import PREFILL_GROUP, Keys
from splitwise_sched.records import Claim
from splitwise_sched.resp import ReplyError, pack
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.wire import Wire

logger = logging.getLogger(__name__)

MIN_VERSION = (6, 2, 0)
CONNECT_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 5.0
RETRY_FIRST_S, RETRY_MAX_S = 0.02, 0.5
PRELUDE = ("common", "preferred", "waiting_room", "rate")
# Each function that a script begins with costs it a tenth of a microsecond; these run most, and use the least.
PRELUDE_OF = {"step": ("common",), "finish": ("common",), "renew_frontend": ("common",), "lapsed": ("common",)}
SCRIPTS = (
    "submit", "resubmit", "bind", "step", "finish", "give_back", "cancel", "expire", "register", "renew", "drain",
    "reap", "renew_frontend", "lapsed", "orphans", "audit",
)  # fmt: skip

_RETRYABLE = (ConnectionError, TimeoutError, OSError)
# The server lives, but not for writing now: it loads its data, or its master's place is being taken.
_NOT_NOW = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")
_DENIED = (AuthenticationError, AuthorizationError, NoPermissionError)


def _script_texts() -> dict[str, str]:
    folder = resources.files("splitwise_sched") / "lua"
    texts = {path: (folder / f"{path}.lua").read_text(encoding="utf-8") for path in (*PRELUDE, *SCRIPTS)}
    return {name: "".join(texts[part] for part in (*PRELUDE_OF.get(name, PRELUDE), name)) for name in SCRIPTS}


class Link:
    """One connection that is made when it is needed, and made anew after it broke.

    redis-py connects (addresses, TLS, login, protocol version); a Wire takes the connection over from there.
    """

    def __init__(self, client: aioredis.Redis) -> None:
        self._pool = client.connection_pool
        self._made: Any = None
        self._wire: Wire | None = None

    async def wire(self) -> Wire:
        """Raises what redis-py raises when it cannot connect."""
        if self._wire is None or self._wire.lost is not None:
            self.close()
            made = self._pool.make_connection()  # type: ignore[no-untyped-call]
            connecting = asyncio.ensure_future(made.connect())
            try:
                # redis-py uses asyncio.wait_for, which until Python 3.12 may swallow a cancellation: not ours.
                await asyncio.wait([connecting])
            except asyncio.CancelledError:
                connecting.cancel()
                await asyncio.wait([connecting])
                if made.is_connected:
                    made._writer.close()
                raise
            connecting.result()
            # Kept as long as the wire: redis-py closes the transport of a connection that nobody holds.
            self._made = made
            self._wire = Wire(made._writer.transport)
        return self._wire

    def close(self) -> None:
        """Idempotent; the next ``wire`` connects again."""
        if self._wire is not None:
            self._wire.close()
            # The transport is closed, and redis-py would wait for a protocol that is no longer its own.
            self._made._reader = self._made._writer = None
            self._made = self._wire = None


class Connection:
    """Pipelined commands and scripts on one shard of a topic, from one process and one event loop.

    ``connect`` before anything else; ``close`` frees the connections. Replies raise StoreUnavailable when Redis could
    not be reached for ``redis_timeout_s``.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        self.keys = Keys(settings.scheduler_topic)
        self.server = ""
        self._settings = settings
        if settings.scheduler_host is None:
            raise ConfigError(
                "scheduler_host is not set: name the Redis or Valkey server, or let embedded.scheduler_server find one"
            )
        host, port = settings.scheduler_host, settings.scheduler_port
        is_socket = host.startswith("/")
        self._address = host if is_socket else f"{host}:{port}"
        password = settings.scheduler_password
        self._options: dict[str, Any] = {
            **({"unix_socket_path": host} if is_socket else {"host": host, "port": port}),
            "db": settings.scheduler_db,
            "username": settings.scheduler_username,
            "password": None if password is None else password.get_secret_value(),
            "decode_responses": True,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_timeout": COMMAND_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
        }
        self._client = aioredis.Redis(**self._options)
        self._link = Link(self._client)
        self._coalescer = Coalescer(self._send)
        self._texts = _script_texts()
        self._shas = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._texts.items()}

    # ---- connection ----------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Check that the server can carry the queue, and load the scripts.

        Raises:
            StoreUnavailable: nobody answers.
            StoreUnsuitable: too old, evicting, or access denied.
        """
        try:
            info = await self._client.info("server")
            memory = await self._client.info("memory")
            self.server = check_server(info, str(memory.get("maxmemory_policy", "noeviction")), self._address)
            for text in self._texts.values():
                await self._client.script_load(text)
            await self._client.hgetall(self.keys.counters)
        except _DENIED as exc:
            raise StoreUnsuitable(
                f"the server at {self._address} refuses access ({exc}): check --scheduler-password, "
                "--scheduler-username and the user's ACL (conf/users.acl is an example)"
            ) from exc
        except _RETRYABLE as exc:
            raise StoreUnavailable(
                f"no Redis or Valkey answers at {self._address} ({exc}): start one with `splitwise-sched redis`, or "
                "correct --scheduler-host and --scheduler-port"
            ) from exc
        except RedisError as exc:
            raise StoreUnsuitable(f"the server at {self._address} cannot be used: {exc}") from exc

    async def settle(self) -> None:
        """Wait until all that was issued is answered."""
        await self._coalescer.drain()

    async def close(self) -> None:
        await self._coalescer.close()
        self._link.close()
        await self._client.aclose()

    def reader(self) -> BlockingReader:
        """A connection of its own for blocking reads; whoever asks for it closes it (async with)."""
        return BlockingReader(self.keys, Link(self._client))

    async def _send(self, batch: list[Command]) -> list[Any]:
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._settings.redis_timeout_s, RETRY_FIRST_S
        while True:
            try:
                return await self._send_once(batch)
            except _RETRYABLE as exc:
                if loop.time() + pause > deadline:
                    raise StoreUnavailable(f"Redis at {self._address} does not answer: {exc}") from exc
                self._link.close()
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
            texts = [self._texts[name] for name in {cast(str, batch[i].script) for i in unknown}]
            loads = [Command(pack(("SCRIPT", "LOAD", text))) for text in texts]
            again = await _pipeline(wire, [*loads, *(batch[i] for i in unknown)])
            for i, reply in zip(unknown, again[len(loads) :], strict=True):
                replies[i] = reply
        for i in errors:
            if isinstance(reply := replies[i], ReplyError):
                if reply.code in _NOT_NOW:
                    raise ConnectionError(str(reply))
                replies[i] = _mapped(reply)
        return replies

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
        try:
            wire = await self._link.wire()
            reply = (await wire.send(pack(args), (False,), block_ms / 1000 + COMMAND_TIMEOUT_S))[0]
        except asyncio.CancelledError:
            # A reply may be on its way that would be taken for the next one's.
            self._link.close()
            raise
        except _RETRYABLE as exc:
            self._link.close()
            raise StoreUnavailable(f"Redis does not answer: {exc}") from exc
        if isinstance(reply, ReplyError):
            if reply.code == "NOGROUP":
                raise Fenced(f"the queue is gone from Redis: {reply}") from reply
            raise StoreUnavailable(str(reply)) from reply
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


async def check(settings: SchedulerSettings) -> str:
    """Whether the server of ``settings`` can carry the queue; its name and version. Raises what ``connect`` raises."""
    connection = Connection(settings)
    try:
        await connection.connect()
        return connection.server
    finally:
        await connection.close()


def check_server(info: Mapping[str, Any], policy: str, address: str) -> str:
    """Whether a server with this ``INFO server`` and eviction policy can carry the queue.

    Returns:
        Its name and version.
    Raises:
        StoreUnsuitable: too old, or it may evict keys.
    """
    version = str(info.get("redis_version", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < MIN_VERSION:
        raise StoreUnsuitable(
            f"the server at {address} is Redis {version}, but 6.2.0 or newer is needed: upgrade it, or run "
            "`splitwise-sched redis` for a private one"
        )
    if policy != "noeviction":
        raise StoreUnsuitable(
            f"the server at {address} has maxmemory-policy {policy!r}, under which queued requests can vanish: set "
            "maxmemory-policy noeviction there (conf/redis.conf is an example)"
        )
    return f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {version}"


def _mapped(exc: ReplyError) -> Exception:
    text = str(exc)
    if "FENCED" in text:
        return Fenced(text)
    mapped = CommandRefused(f"Redis refused a command: {text}")
    mapped.__cause__ = exc
    return mapped
