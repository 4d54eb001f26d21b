"""How a connection to a server is made through redis-py: address, TLS, login, time-outs; and what its errors mean."""

from __future__ import annotations

import inspect
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from splitwise_sched.errors import ConfigError
from splitwise_sched.settings import ServerSettings

CONNECT_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 5.0

Address = tuple[str, int]
# redis-py tells its name to servers that can be told (CLIENT SETINFO); whoever may not do that would fill the ACL log.
_NAMELESS: dict[str, Any] = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(AbstractConnection.__init__).parameters
    else {"lib_name": None, "lib_version": None}
)
DENIED = (AuthenticationError, AuthorizationError, NoPermissionError)


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


class Dialer:
    """Makes connections as the settings say. Raises ConfigError for TLS files that are of no use."""

    def __init__(self, settings: ServerSettings) -> None:
        self._options = _options(settings)
        self._tls = _tls_options(settings)

    async def dial(self, address: Address, **options: Any) -> Any:
        """A connection of redis-py's to this very server; whoever asks for it closes it. Raises LinkFailed.

        Args:
            options: of redis-py's, in place of those from the settings.
        """
        host, port = address
        kind = SSLConnection if self._tls else Connection
        return await _opened(kind(host=host, port=port, **{**self._options, **self._tls, **options}), address)

    async def dial_socket(self, path: str) -> Any:
        """``dial`` for a Unix socket."""
        return await _opened(UnixDomainSocketConnection(path=path, **self._options))

    def sentinels(self, addresses: Sequence[Address], login: Mapping[str, Any], timeout_s: float) -> list[Any]:
        """A client of redis-py's for each; they have a login of their own."""
        options = {
            **login,
            "socket_connect_timeout": timeout_s,
            "socket_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
            **_NAMELESS,
            **({"ssl": True, **self._tls} if self._tls else {}),
        }
        made: list[Any] = Sentinel(list(addresses), sentinel_kwargs=options).sentinels  # type: ignore[no-untyped-call]
        return made


async def _opened(connection: Any, address: Address | None = None) -> Any:
    try:
        await connection.connect()
    except (RedisError, OSError) as exc:
        raise mapped(exc, address) from exc
    except BaseException:
        if connection.is_connected:
            connection._writer.close()
        raise
    return connection


def mapped(exc: Exception, address: Address | None) -> LinkFailed:
    """An error of redis-py's, or of the network's, as it is told on."""
    if isinstance(exc, DENIED):
        return AccessDenied(str(exc))
    return LinkFailed(str(exc), address=address, tls=tls_error(exc))


def tls_error(exc: BaseException) -> ssl.SSLError | None:
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
