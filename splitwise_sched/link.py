"""A connection to whoever has a shard: made when it is needed, and made anew after it broke."""

from __future__ import annotations

import asyncio
from typing import Any

from splitwise_sched.dialing import COMMAND_TIMEOUT_S, Address, LinkFailed
from splitwise_sched.discovery import Servers
from splitwise_sched.resp import ReplyError, pack
from splitwise_sched.wire import Wire

_PING = pack(("PING",))


class Link:
    """One connection that is made when it is needed, and made anew after it broke, to whoever has the shard then."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self._made: Any = None
        self._wire: Wire | None = None
        self._address: Address | None = None
        self._asked: Link | None = None

    async def wire(self) -> Wire:
        """Raises LinkFailed."""
        if self._wire is not None and self._address != self.servers.found:
            # Another connection has found another master: this one's may go on without knowing that it is none.
            self.close()
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
            self._address = (self._host, self._made.port) if self._host else None
        return self._wire

    async def try_out(self) -> None:
        """Whether who is there answers at all: not every login or handshake that fails shows before the first command.

        Raises LinkFailed.
        """
        wire = await self.wire()
        try:
            await wire.send(_PING, (False,), COMMAND_TIMEOUT_S)
        except OSError as exc:
            address = (self._host, self._made.port) if self._host else None
            self.broke()
            raise LinkFailed(str(exc), address=address, is_passing=self.servers.has_successors) from exc

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
    def peer(self) -> str:
        """host:port of who is connected to; "" for a unix socket, and without a connection."""
        return f"{self._host}:{self._made.port}" if self._host else ""

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
