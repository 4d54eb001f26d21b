"""Finds the server that has a shard of a topic, and connects to it.

A Wire takes the connection over from there. What redis-py raises ends here, and in ``dialing``, as LinkFailed: no other
module imports redis.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from redis.crc import key_slot
from redis.exceptions import RedisError

from splitwise_sched.dialing import DENIED, AccessDenied, Address, Dialer, LinkFailed, mapped, tls_error
from splitwise_sched.errors import ConfigError
from splitwise_sched.keys import Keys
from splitwise_sched.settings import ServerSettings, split_address

# For those who are only asked where the master is: another one can be asked instead.
ASK_TIMEOUT_S = 2.0


class Servers(ABC):
    """The server that has a shard now, which may be another tomorrow.

    Attributes:
        has_successors: another server takes over when this one dies.
        found: who was connected to last, of all connections to the shard.
    """

    has_successors = True
    found: Address | None = None

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._dialer = Dialer(settings)

    @property
    @abstractmethod
    def description(self) -> str:
        """For messages: what the settings name."""

    @abstractmethod
    async def locate(self) -> Address:
        """The master. Raises LinkFailed."""

    def moved(self, address: str) -> None:
        """The server said that the shard is on the one at ``address``. Raises LinkFailed when that is none."""

    def at(self, address: str) -> Servers:
        """Another server, reached in the same way."""
        return _Named(self._settings, address)

    def forget(self) -> None:
        """What is known of the master has turned out to be of no use."""

    async def connect(self) -> Any:
        """A connection of redis-py's to the master; whoever asks for it closes it. Raises LinkFailed."""
        address = await self.locate()
        try:
            connection = await self.connect_to(address)
        except LinkFailed as exc:
            self.forget()
            # Whoever named it may not know yet that it is gone, and will name another.
            exc.is_passing = self.has_successors and exc.tls is None and not isinstance(exc, AccessDenied)
            raise
        self.found = address
        return connection

    async def connect_to(self, address: Address, **options: Any) -> Any:
        """A connection to this very server. Raises LinkFailed."""
        return await self._dialer.dial(address, **options)


class OneServer(Servers):
    """The one that the settings name."""

    has_successors = False

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(settings)
        if settings.scheduler_host is None:
            raise ConfigError(
                "scheduler_host is not set: name the Redis or Valkey server, or let embedded.scheduler_server find one"
            )
        self._host, self._port = settings.scheduler_host, settings.scheduler_port
        self._is_socket = self._host.startswith("/")

    @property
    def description(self) -> str:
        return self._host if self._is_socket else f"{self._host}:{self._port}"

    async def locate(self) -> Address:
        return self._host, self._port

    async def connect(self) -> Any:
        if self._is_socket:
            return await self._dialer.dial_socket(self._host)
        return await super().connect()


class SentinelServers(Servers):
    """The master that Sentinels name; they are asked for it before every connection."""

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(settings)
        assert settings.scheduler_sentinel_service is not None
        self._service = settings.scheduler_sentinel_service
        password = settings.scheduler_sentinel_password
        self._sentinels = self._dialer.sentinels(
            [split_address(text) for text in settings.scheduler_sentinels],
            {
                "username": settings.scheduler_sentinel_username,
                "password": None if password is None else password.get_secret_value(),
            },
            ASK_TIMEOUT_S,
        )
        self._addresses = list(settings.scheduler_sentinels)
        self._asking = asyncio.Lock()

    @property
    def description(self) -> str:
        return f"the master {self._service!r} of the Sentinels {', '.join(self._addresses)}"

    async def locate(self) -> Address:
        # All connections that break together ask at once, and there is one client a Sentinel.
        async with self._asking:
            return await self._ask()

    async def _ask(self) -> Address:
        failures: list[str] = []
        names: set[str] = set()
        denied, is_down = False, False
        telling: Exception | None = None
        for i, (sentinel, name) in enumerate(zip(self._sentinels, self._addresses, strict=True)):
            try:
                masters = _by_name(await sentinel.sentinel_masters())
            except (RedisError, OSError) as exc:
                denied = denied or isinstance(exc, DENIED)
                # What TLS said tells more than that somebody else is away.
                telling = exc if telling is None or tls_error(telling) is None else telling
                failures.append(f"{name}: {exc}")
                continue
            finally:
                # Asked once in a long while: no reason to keep connections there.
                await sentinel.connection_pool.disconnect()
            state = masters.get(self._service)
            if state is None:
                names |= masters.keys()
                failures.append(f"{name} does not watch it")
            elif not state["is_master"] or state["is_sdown"] or state["is_odown"]:
                is_down = True
                failures.append(f"{name} takes it for down")
            else:
                # The next time, the one that knew it is asked first.
                self._sentinels.insert(0, self._sentinels.pop(i))
                self._addresses.insert(0, self._addresses.pop(i))
                return str(state["ip"]), int(state["port"])
        text = f"the Sentinels name no master for {self._service!r} ({'; '.join(failures)})"
        if names and not is_down:
            text += f"; what they watch: {', '.join(sorted(names))} (--scheduler-sentinel-service)"
        if denied:
            raise AccessDenied(text, by_sentinel=True)
        tls = None if telling is None else tls_error(telling)
        raise LinkFailed(text, address=split_address(self._addresses[0]), tls=tls, is_passing=is_down)


class ClusterServers(Servers):
    """The master of a shard's slot in a Redis Cluster: asked for once, and again when it fails or has moved."""

    def __init__(self, settings: ServerSettings, keys: Keys) -> None:
        super().__init__(settings)
        self._seeds = [split_address(text) for text in settings.scheduler_cluster_nodes]
        self._nodes = list(self._seeds)
        self._slot = key_slot(keys.prefix.encode())
        self._master: Address | None = None
        self._shard = keys.shard

    @property
    def description(self) -> str:
        seeds = ", ".join(f"{host}:{port}" for host, port in self._seeds)
        return f"the Cluster with {seeds} (shard {self._shard}, slot {self._slot})"

    def moved(self, address: str) -> None:
        self._master = _parsed(address)

    def forget(self) -> None:
        if self._master is not None and self._master in self._nodes:
            # It is asked last where its slots have gone.
            self._nodes.remove(self._master)
            self._nodes.append(self._master)
        self._master = None

    async def locate(self) -> Address:
        if self._master is None:
            self._master = await self._discover()
        return self._master

    async def _discover(self) -> Address:
        failures: list[str] = []
        telling: LinkFailed | None = None
        is_passing = False
        for node in dict.fromkeys((*self._nodes, *self._seeds)):
            try:
                rows = await self._slots(node)
            except LinkFailed as exc:
                failures.append(f"{node[0]}:{node[1]}: {exc}")
                # What TLS or a login said tells more than that somebody else is away.
                if telling is None or (telling.tls is None and not isinstance(telling, AccessDenied)):
                    telling = exc
                continue
            masters = [
                (int(begin), int(end), (_text(master[0]) or node[0], int(master[1]))) for begin, end, master, *_ in rows
            ]
            self._nodes = list(dict.fromkeys((node, *(address for _, _, address in masters))))
            for begin, end, address in masters:
                if begin <= self._slot <= end:
                    return address
            is_passing = True
            failures.append(f"{node[0]}:{node[1]}: slot {self._slot} is on no node")
        text = f"no node of the Cluster says where slot {self._slot} is ({'; '.join(failures)})"
        if isinstance(telling, AccessDenied):
            raise AccessDenied(text)
        asked, tls = (None, None) if telling is None else (telling.address, telling.tls)
        raise LinkFailed(text, address=asked, tls=tls, is_passing=is_passing)

    async def _slots(self, node: Address) -> Sequence[Any]:
        connection = await self.connect_to(node, socket_connect_timeout=ASK_TIMEOUT_S, socket_timeout=ASK_TIMEOUT_S)
        try:
            await connection.send_command("CLUSTER", "SLOTS")
            reply: Sequence[Any] = await connection.read_response()
            return reply
        except (RedisError, OSError) as exc:
            raise mapped(exc, node) from exc
        finally:
            await connection.disconnect()


class _Named(Servers):
    """A server that another server named."""

    has_successors = False

    def __init__(self, settings: ServerSettings, address: str) -> None:
        super().__init__(settings)
        self._address = _parsed(address)
        self._text = address

    @property
    def description(self) -> str:
        return self._text

    async def locate(self) -> Address:
        return self._address


def _parsed(address: str) -> Address:
    # IPv6 addresses come without brackets.
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise LinkFailed(f"the server named {address[:200]!r}, which is no address")
    return host, int(port)


def servers_of(settings: ServerSettings, keys: Keys) -> Servers:
    """Raises ConfigError when the settings name no server, or TLS files that are of no use."""
    if settings.scheduler_sentinels:
        return SentinelServers(settings)
    if settings.scheduler_cluster_nodes:
        return ClusterServers(settings, keys)
    return OneServer(settings)


def _by_name(masters: Any) -> dict[str, dict[str, Any]]:
    """What redis-py makes of SENTINEL MASTERS, which depends on its version and the protocol's."""
    return masters if isinstance(masters, dict) else {master["name"]: master for master in masters}


def _text(value: Any) -> str:
    """A host as CLUSTER SLOTS gives it; "" where it means: the one that you asked."""
    text = value.decode() if isinstance(value, bytes) else str(value or "")
    return "" if text == "?" else text
