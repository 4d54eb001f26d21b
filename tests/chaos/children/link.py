"""The links between some processes and Redis, each through a port of its own here, where it may be cut or made slow.

A cut link loses nothing: as on a real network, what was sent waits, and arrives when the link is back, if anybody still
listens. Packet loss is what TCP makes of it: now and then everything waits for a retransmission.
"""

from __future__ import annotations

import asyncio
import random

from tests.chaos.channel import Channel

RETRANSMIT_S = 0.25
HIGH_WATER = 1 << 20


class Link:
    """How the connections of one process are: ``passing`` is cleared while it is cut."""

    def __init__(self) -> None:
        self.passing = asyncio.Event()
        self.passing.set()
        self.delay_s = 0.0
        self.loss = 0.0
        self._draw = random.Random(0)

    def set(self, mode: str, amount: float) -> None:
        self.delay_s = amount if mode == "delay" else 0.0
        self.loss = amount if mode == "loss" else 0.0
        if mode == "cut":
            self.passing.clear()
        else:
            self.passing.set()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.loss and self._draw.random() < self.loss:
                    await asyncio.sleep(RETRANSMIT_S)
                await self.passing.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # one side is gone: so is the other
        finally:
            writer.close()


async def run(channel: Channel, commands: asyncio.Queue[list], targets: dict[str, tuple[str, int]]) -> None:
    """``targets``: where each link leads, by the name of its process."""
    links = {name: Link() for name in targets}
    servers = []

    async def open_link(name: str) -> int:
        async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            link = links[name]
            await link.passing.wait()
            try:
                there_reader, there_writer = await asyncio.open_connection(*targets[name])
            except OSError:
                writer.close()
                return
            await asyncio.gather(link.forward(reader, there_writer), link.forward(there_reader, writer))

        servers.append(await asyncio.start_server(join, "127.0.0.1", 0))
        return int(servers[-1].sockets[0].getsockname()[1])

    channel.tell("ports", {name: await open_link(name) for name in targets})
    channel.tell("ready")
    while True:
        command, *args = await commands.get()
        if command == "close":
            return
        if command == "link":
            name, mode, amount = args
            links[name].set(mode, amount)
