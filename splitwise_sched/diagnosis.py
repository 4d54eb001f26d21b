"""Why a server cannot be reached, in the words of whoever has to change something for it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

from splitwise_sched.dialing import AccessDenied, Address, LinkFailed
from splitwise_sched.errors import ConfigError, SplitwiseError, StoreUnavailable, StoreUnsuitable
from splitwise_sched.settings import ServerSettings

PROBE_TIMEOUT_S = 2.0
# OpenSSL's X509_V_ERR_*.
_HOSTNAME_MISMATCH, _IP_MISMATCH, _NOT_YET_VALID, _EXPIRED = 62, 64, 9, 10


def access_denied(description: str, detail: object, *, by_sentinel: bool = False) -> StoreUnsuitable:
    if by_sentinel:
        return StoreUnsuitable(
            f"the Sentinels refuse access ({detail}): check --scheduler-sentinel-password and "
            "--scheduler-sentinel-username"
        )
    return StoreUnsuitable(
        f"the server at {description} refuses access ({detail}): check --scheduler-password, --scheduler-username and "
        "the user's ACL (`splitwise-sched acl` prints one, conf/users.acl is an example)"
    )


async def why_unreachable(failure: OSError, description: str, settings: ServerSettings) -> SplitwiseError:
    """The error to raise for a connection that could not be made; looks at the server once more where that tells."""
    if isinstance(failure, AccessDenied):
        return access_denied(description, failure, by_sentinel=failure.by_sentinel)
    address = failure.address if isinstance(failure, LinkFailed) else None
    if settings.scheduler_tls:
        tls = failure.tls if isinstance(failure, LinkFailed) else None
        problem = await _why_no_tls(failure, tls, address, settings)
        if problem is not None:
            return ConfigError(problem)
    elif address is not None and await _speaks_tls(address):
        return ConfigError(f"the server at {_shown(address)} speaks TLS: add --scheduler-tls and --scheduler-tls-ca")
    if settings.scheduler_cluster_nodes and "cluster support disabled" in str(failure):
        return StoreUnsuitable(
            f"the server at {', '.join(settings.scheduler_cluster_nodes)} is no node of a Cluster: give it with "
            "--scheduler-host and --scheduler-port"
        )
    if settings.scheduler_sentinels and "unknown command" in str(failure).lower():
        return StoreUnsuitable(
            f"the server at {', '.join(settings.scheduler_sentinels)} is no Sentinel: give it with --scheduler-host "
            "and --scheduler-port, or the Sentinels' own ports"
        )
    remedy = "start one with `splitwise-sched redis`, or correct --scheduler-host and --scheduler-port"
    if settings.scheduler_sentinels:
        remedy = "see whether they run, and correct --scheduler-sentinels"
    elif settings.scheduler_cluster_nodes:
        remedy = "see whether they run, and correct --scheduler-cluster-nodes"
    return StoreUnavailable(f"no Redis or Valkey answers at {description} ({failure}): {remedy}")


async def _why_no_tls(
    failure: OSError, tls: ssl.SSLError | None, address: Address | None, settings: ServerSettings
) -> str | None:
    """What is wrong about TLS; None when that is not what failed."""
    where = "the server" if address is None else f"the server at {_shown(address)}"
    if isinstance(tls, ssl.SSLCertVerificationError):
        code, why = tls.verify_code, tls.verify_message.rstrip(".")
        if code in (_HOSTNAME_MISMATCH, _IP_MISMATCH):
            return (
                f"{where} has a certificate for another name ({why}): name it as its certificate does, give it one for "
                "this name, or pass --no-scheduler-tls-check-hostname"
            )
        if code in (_EXPIRED, _NOT_YET_VALID):
            return f"the certificate of {where[4:]} is not valid now ({why}): renew it, or set this machine's clock"
        trusted = settings.scheduler_tls_ca or "the system's CAs, as --scheduler-tls-ca is not given"
        return (
            f"the certificate of {where[4:]} cannot be trusted ({why}); trusted are: {trusted}. Give the CA that "
            "signed it with --scheduler-tls-ca"
        )
    if address is not None and await _speaks_plainly(address):
        return f"{where} does not speak TLS on this port: leave --scheduler-tls out, or give its TLS port"
    if (tls is not None and "alert" in str(tls).lower()) or (address is not None and await _speaks_tls(address)):
        given = settings.scheduler_tls_cert
        return f"{where} refuses this client's certificate ({tls or failure}): " + (
            "it wants one, give it with --scheduler-tls-cert and --scheduler-tls-key"
            if given is None
            else f"give one that its CA has signed, --scheduler-tls-cert is {given}"
        )
    return None


async def _speaks_tls(address: Address) -> bool:
    """Whether a handshake comes to an end there; whom it is with does not matter."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        _, writer = await asyncio.wait_for(asyncio.open_connection(*address, ssl=context), PROBE_TIMEOUT_S)
        writer.transport.abort()
        return True
    return False


async def _speaks_plainly(address: Address) -> bool:
    """Whether it answers the Redis protocol without TLS, if only to say no."""
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        reader, writer = await asyncio.wait_for(asyncio.open_connection(*address), PROBE_TIMEOUT_S)
        try:
            writer.write(b"PING\r\n")
            return await asyncio.wait_for(reader.read(1), PROBE_TIMEOUT_S) in (b"+", b"-")
        finally:
            writer.transport.abort()
    return False


def _shown(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
