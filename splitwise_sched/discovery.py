"""The only module that imports redis: finds the server that has a shard of a topic, and connects to it.

redis-py connects (addresses, TLS, login, protocol version); a Wire takes the connection over from there. What it
raises ends here, as LinkFailed.
"""

from __future__ import annotations

import asyncio
import inspect
import ssl
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from splitwise_sched.errors import ConfigError
from splitwise_sched.keys import Keys
from splitwise_sched.settings import ServerSettings, split_address

CONNECT_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 5.0
# For those who are only asked where the master is: another one can be asked instead.
ASK_TIMEOUT_S = 2.0

Address = tuple[str, int]
# redis-py tells its name to servers that can be told (CLIENT SETINFO); whoever may not do that would fill the ACL log.
_NAMELESS: dict[str, Any] = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(AbstractConnection.__init__).parameters
    else {"lib_name": None, "lib_version": None}
)
_DENIED = (AuthenticationError, AuthorizationError, NoPermissionError)


class LinkFailed(ConnectionError):
    """There is no connection to the server; another try may succeed.

    Attributes:
        address: who was asked.
        tls: what TLS said, when it was that.
        is_passing: another master is being made.
    """

    def __init__(
        self,
        message: str,
        *,
        address: Address | None = None,
        tls: ssl.SSLError | None = None,
        is_passing: bool = False,
    ) -> None:
        super().__init__(message)
        self.address, self.tls, self.is_passing = address, tls, is_passing


class AccessDenied(LinkFailed):
    """The server, or the Sentinels, refuse the user or the password."""

    def __init__(self, message: str, *, by_sentinel: bool = False) -> None:
        super().__init__(message)
        self.by_sentinel = by_sentinel


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
        self._options = _options(settings)
        self._tls = _tls_options(settings)

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
        host, port = address
        kind = SSLConnection if self._tls else Connection
        return await _connected(kind(host=host, port=port, **{**self._options, **self._tls, **options}), address)


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
            return await _connected(UnixDomainSocketConnection(path=self._host, **self._options))
        return await super().connect()


class SentinelServers(Servers):
    """The master that Sentinels name; they are asked for it before every connection."""

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(settings)
        assert settings.scheduler_sentinel_service is not None
        self._service = settings.scheduler_sentinel_service
        password = settings.scheduler_sentinel_password
        tls = {"ssl": True, **self._tls} if self._tls else {}
        self._sentinels = Sentinel(  # type: ignore[no-untyped-call]
            [split_address(text) for text in settings.scheduler_sentinels],
            sentinel_kwargs={
                "username": settings.scheduler_sentinel_username,
                "password": None if password is None else password.get_secret_value(),
                "socket_connect_timeout": ASK_TIMEOUT_S,
                "socket_timeout": ASK_TIMEOUT_S,
                "retry": Retry(NoBackoff(), 0),
                **_NAMELESS,
                **tls,
            },
        ).sentinels
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
                denied = denied or isinstance(exc, _DENIED)
                # What TLS said tells more than that somebody else is away.
                telling = exc if telling is None or _tls_error(telling) is None else telling
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
        tls = None if telling is None else _tls_error(telling)
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
            raise _mapped(exc, node) from exc
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


async def _connected(connection: Any, address: Address | None = None) -> Any:
    try:
        await connection.connect()
    except (RedisError, OSError) as exc:
        raise _mapped(exc, address) from exc
    except BaseException:
        if connection.is_connected:
            connection._writer.close()
        raise
    return connection


def _mapped(exc: Exception, address: Address | None) -> LinkFailed:
    if isinstance(exc, _DENIED):
        return AccessDenied(str(exc))
    return LinkFailed(str(exc), address=address, tls=_tls_error(exc))


def _tls_error(exc: BaseException) -> ssl.SSLError | None:
    """What TLS said, somewhere among what led to ``exc``."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _options(settings: ServerSettings) -> dict[str, Any]:
    password = settings.scheduler_password
    return {
        "db": settings.scheduler_db,
        "username": settings.scheduler_username,
        "password": None if password is None else password.get_secret_value(),
        "decode_responses": True,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": COMMAND_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        **_NAMELESS,
    }


def _tls_options(settings: ServerSettings) -> dict[str, Any]:
    """Raises ConfigError when a file cannot be used: at once, and not at every try to connect."""
    if not settings.scheduler_tls:
        return {}
    ca, certificate, key = settings.scheduler_tls_ca, settings.scheduler_tls_cert, settings.scheduler_tls_key
    context = ssl.create_default_context()
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"--scheduler-tls-ca {ca} is no file with CA certificates (PEM): {exc}") from exc
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as exc:
            raise ConfigError(
                f"--scheduler-tls-cert {certificate} and --scheduler-tls-key {key} are no certificate and its key "
                f"(PEM, without a passphrase): {exc}"
            ) from exc
    return {
        "ssl_ca_certs": None if ca is None else str(ca),
        "ssl_certfile": None if certificate is None else str(certificate),
        "ssl_keyfile": None if key is None else str(key),
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": settings.scheduler_tls_check_hostname,
    }


def _no_password() -> str:
    """Instead of OpenSSL's question on the terminal."""
    raise ValueError("the key has a passphrase")


def _by_name(masters: Any) -> dict[str, dict[str, Any]]:
    """What redis-py makes of SENTINEL MASTERS, which depends on its version and the protocol's."""
    return masters if isinstance(masters, dict) else {master["name"]: master for master in masters}


def _text(value: Any) -> str:
    """A host as CLUSTER SLOTS gives it; "" where it means: the one that you asked."""
    text = value.decode() if isinstance(value, bytes) else str(value or "")
    return "" if text == "?" else text
