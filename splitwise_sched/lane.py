"""Pipelines over one link, sent again to whoever can do them until time is over.

Every command may be repeated without harm (scripts recognise a repetition, outputs are deduplicated by whoever reads
them), so a broken connection, a failover or a moved slot is no failure yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

from splitwise_sched.coalesce import Command
from splitwise_sched.dialing import COMMAND_TIMEOUT_S
from splitwise_sched.errors import CommandRefused, Fenced, StoreUnavailable
from splitwise_sched.link import Link
from splitwise_sched.resp import ReplyError, pack
from splitwise_sched.wire import Wire

RETRY_FIRST_S, RETRY_MAX_S = 0.02, 0.5
# The server lives, but not for this command: others have the shard, or will. One without its replicas may have been
# replaced by one of them, and not know it for long.
_LEAVE = ("READONLY", "MASTERDOWN", "CLUSTERDOWN", "NOREPLICAS")
# It loads its data, a slot's keys are in two places.
_STAY = ("LOADING", "TRYAGAIN")
_PASSING = (*_LEAVE, *_STAY, "MOVED")
ASKING = pack(("ASKING",))


class NotNow(ConnectionError):
    """The server did not do a command, and may later, or another server will.

    Attributes:
        replies: of the pipeline's commands before that one.
    """

    def __init__(self, message: str, replies: list[Any]) -> None:
        super().__init__(message)
        self.replies = replies


class Lane:
    """
    Args:
        texts: of the scripts, by name: one that the server does not know is loaded.
        timeout_s: for how long a command is tried.
        silence_s: for how long a server may say nothing.
    """

    def __init__(
        self, link: Link, texts: Mapping[str, str], timeout_s: float, silence_s: float = COMMAND_TIMEOUT_S
    ) -> None:
        self.link = link
        self._texts = texts
        self._timeout_s = timeout_s
        self._silence_s = silence_s

    async def send(self, batch: list[Command]) -> list[Any]:
        """[num_commands] replies, in order; an exception where the server refused a command.

        Raises StoreUnavailable; some of the commands may have been done.
        """
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._timeout_s, RETRY_FIRST_S
        done: list[Any] = []
        while True:
            try:
                replies = await self._send_once(batch[len(done) :] if done else batch)
                return [*done, *replies] if done else replies
            except OSError as exc:
                if isinstance(exc, NotNow):
                    done += exc.replies
                else:
                    self.link.broke()
                if loop.time() + pause > deadline:
                    raise StoreUnavailable(f"Redis at {self.link.servers.description} does not answer: {exc}") from exc
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX_S)

    async def _send_once(self, batch: list[Command]) -> list[Any]:
        wire = await self.link.wire()
        replies = await self._pipeline(wire, batch)
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
            self.link.moved(error)
        elif code in _LEAVE:
            self.link.broke()
        raise NotNow(str(error), replies)

    async def _load_and_repeat(self, wire: Wire, batch: list[Command], replies: list[Any], unknown: list[int]) -> None:
        texts = [self._texts[name] for name in {cast(str, batch[i].script) for i in unknown}]
        loads = [Command(pack(("SCRIPT", "LOAD", text))) for text in texts]
        again = await self._pipeline(wire, [*loads, *(batch[i] for i in unknown)])
        for i, reply in zip(unknown, again[len(loads) :], strict=True):
            replies[i] = reply

    async def _ask(self, error: ReplyError, command: Command) -> Any:
        """The reply to ``command`` of the node that its slot is on its way to."""
        wire = await self.link.asking(error)
        packed = [ASKING, command.packed]
        if command.script is not None:
            # That node may not know it yet.
            packed.insert(0, pack(("SCRIPT", "LOAD", self._texts[command.script])))
        binary = [*[False] * (len(packed) - 1), command.binary]
        return (await wire.send(b"".join(packed), binary, self._silence_s))[-1]

    async def _pipeline(self, wire: Wire, batch: Sequence[Command]) -> list[Any]:
        packed = b"".join([command.packed for command in batch])
        return await wire.send(packed, [command.binary for command in batch], self._silence_s)


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
