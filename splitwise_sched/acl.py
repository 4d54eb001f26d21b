"""The least that a Redis user needs for one topic, as Redis access control lists have it.

Redis checks keys and commands that a script uses as if its caller had sent them, so that loading scripts, which this
library has to, opens no door. Commands are named one by one: categories differ between versions, and hold more.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from splitwise_sched.types import check_id

ServerKind = Literal["redis", "cluster", "sentinel"]

# What the library sends, and what its scripts call.
COMMANDS = (
    "ping", "select", "info", "time", "wait", "evalsha", "script|load",
    "del", "exists", "expire", "persist", "pexpire", "rename", "unlink", "get", "mget", "set",
    "hdel", "hget", "hgetall", "hincrby", "hkeys", "hmget", "hset",
    "sadd", "sismember", "smembers", "srem",
    "zadd", "zcard", "zrange", "zrangebyscore", "zrem", "zremrangebyscore", "zscan", "zscore",
    "xack", "xadd", "xdel", "xgroup|create", "xgroup|delconsumer", "xinfo|consumers", "xinfo|groups",
    "xinfo|stream", "xlen", "xpending", "xrange", "xread", "xreadgroup", "xtrim",
)  # fmt: skip
# What a person who looks into the topic wants besides, and a script of theirs could do with the above.
LOOKING = (
    "type", "ttl", "pttl", "strlen", "hlen", "scard", "zcount", "xrevrange",
)  # fmt: skip
CLUSTER_COMMANDS = ("asking", "cluster|slots")
SENTINEL_COMMANDS = ("ping", "sentinel|masters")


def key_patterns(topic: str) -> tuple[str, ...]:
    """Those of all shards of ``topic``, and of no topic whose name only begins like this one's."""
    check_id("topic", topic)
    return tuple(f"~pd:{{{topic}:{'[0-9]' * digits}}}:*" for digits in (1, 2, 3))


def rules(topic: str, server: ServerKind, password: str | None) -> str:
    """What follows the user's name in an ACL file's line, or in ACL SETUSER; the password goes in as its hash.

    Raises InvalidRequest when ``topic`` cannot be one.
    """
    secret = ">change-me" if password is None else f"#{hashlib.sha256(password.encode()).hexdigest()}"
    commands, patterns = SENTINEL_COMMANDS, tuple[str, ...]()
    if server != "sentinel":
        commands = (*COMMANDS, *LOOKING, *(CLUSTER_COMMANDS if server == "cluster" else ()))
        patterns = key_patterns(topic)
    return " ".join(("on", secret, "resetkeys", *patterns, "resetchannels", "-@all", *(f"+{c}" for c in commands)))


def acl_file(topic: str, user: str, server: ServerKind, password: str | None) -> str:
    """A whole ACL file: this user, and nobody without a name."""
    return f"user default off\nuser {user} {rules(topic, server, password)}\n"


def acl_command(topic: str, user: str, server: ServerKind, password: str | None) -> str:
    """For redis-cli; the user is exactly this afterwards, and no other user is touched."""
    return f"ACL SETUSER {user} reset {rules(topic, server, password)}\n"
