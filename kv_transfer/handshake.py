"""How two messengers come to believe each other. Pure.

Either side sends a random challenge and proves that it knows the secret by a keyed digest over the whole Hello and
both challenges. The two proofs are over different words, so that neither can be played back to its maker, and the
Hello names the process that is meant, so that it cannot be relayed to another one. Without a secret the key is empty:
the handshake then still finds out about wrong processes and wrong layouts, but keeps nobody out.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from kv_transfer.endpoint import RankEndpoint
from kv_transfer.errors import InvalidLayout, LayoutMismatch
from kv_transfer.identity import ProcessIdentity
from kv_transfer.layout import KVLayout, check_compatible
from kv_transfer.protocol import DIGEST_BYTES, WIRE_VERSION, Hello, Refused, encode


def new_challenge() -> bytes:
    return secrets.token_bytes(DIGEST_BYTES)


def greet(own: RankEndpoint, peer: RankEndpoint) -> Hello:
    """What a destination says first."""
    return Hello(
        version=WIRE_VERSION,
        target=peer.nonce,
        name=own.describe(),
        host_id=own.process.host,
        pid=own.process.pid,
        pid_start=own.process.start,
        layout=own.layout.to_dict(),
        challenge=new_challenge(),
    )


def proof(secret: str | None, side: str, hello: Hello, challenge: bytes) -> bytes:
    """That ``side`` ("source" or "destination") knows the secret; [32] bytes.

    Args:
        challenge: the source's, from its Welcome.
    """
    text = b"kv_transfer\0" + side.encode() + b"\0" + hashlib.sha256(encode(hello)).digest() + challenge
    return hmac.digest((secret or "").encode(), text, "sha256")


def is_proof(given: bytes, secret: str | None, side: str, hello: Hello, challenge: bytes) -> bool:
    return hmac.compare_digest(given, proof(secret, side, hello, challenge))


def examine(hello: Hello, own: RankEndpoint) -> KVLayout | Refused:
    """The destination's layout, or why the source does not want to talk to it."""
    if hello.target != own.nonce:
        return Refused("stranger", f"this is {own.describe()} with nonce {own.nonce}, not {hello.target[:64]}")
    try:
        layout = KVLayout.from_dict(hello.layout)
        check_compatible(own.layout, layout)
    except InvalidLayout as exc:
        return Refused("layout", str(exc))
    except LayoutMismatch as exc:
        return Refused("layout", str(exc))
    return layout


def refuse_version(theirs: int) -> Refused:
    return Refused(
        "version",
        f"the wire versions differ: {WIRE_VERSION} here and {theirs} at the peer; install the same release on both",
    )


def process_of(hello: Hello) -> ProcessIdentity:
    return ProcessIdentity(hello.host_id, hello.pid, hello.pid_start)
