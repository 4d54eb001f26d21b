"""An instance whose model is a function (workload.py) and takes no time; everything around the model is real.

Prefill hands over to decode by datagrams, as the KV would go: decode waits for it, and gives the run back when it does
not come. After a pause that it did not choose (SIGSTOP, or a machine that is too slow), decode catches up at once, as
an engine without a timer would: what a zombie sends when it wakes is not a trickle.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from splitwise_sched.instance import InstanceSession
from splitwise_sched.records import DecodeAssigned, Dropped, InstanceEvent, LeaseLost, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import FinishReason, Output, Request, Role
from tests.chaos.channel import Channel
from tests.chaos.children.common import start, tell_stats
from tests.chaos.spec import ChildSpec
from tests.chaos.workload import MODEL, token_of, values

ROOM = 48
HANDOVER_TIMEOUT_S = 2.0
WOKE_AFTER_S = 0.6
BURST_TOKENS = 40
Run = tuple[str, int]


class Sequence:
    """One run on decode: what comes next, at which position."""

    def __init__(self, request: Request, epoch: int, since: float) -> None:
        self.request_id, self.epoch, self.since = request.request_id, epoch, since
        self.index = len(request.emitted_token_ids)
        self.last = request.sampling.max_tokens - 1
        self._values: Iterator[int] = values(request.prompt_token_ids, request.emitted_token_ids)

    @property
    def run(self) -> Run:
        return self.request_id, self.epoch

    def step(self, count: int = 1) -> Output:
        count = min(count, self.last + 1 - self.index)
        tokens = tuple(token_of(next(self._values), self.epoch) for _ in range(count))
        output = Output(
            self.request_id, self.epoch, self.index, tokens,
            finish_reason=FinishReason.LENGTH if self.index + count > self.last else None,
        )  # fmt: skip
        self.index += count
        return output


class ZeroWorkInstance(asyncio.DatagramProtocol):
    def __init__(self, spec: ChildSpec, settings: SchedulerSettings, channel: Channel) -> None:
        self._spec, self._settings, self._channel = spec, settings, channel
        self.session: InstanceSession
        self._handovers: asyncio.DatagramTransport
        self._prefilling: list[PrefillAssigned] = []
        self._reserved: dict[Run, Sequence] = {}
        self._running: dict[Run, Sequence] = {}
        self._early: dict[Run, float] = {}  # handed over before the inbox told of it
        self._ticked_at = time.monotonic()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._handovers, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        port = self._handovers.get_extra_info("sockname")[1]
        registration = Registration(
            name=self._spec.name,
            role=Role(self._spec.role),
            model=MODEL,
            must_match={"kv.dtype": "none"},
            capacity_tokens=60_000,
            capacity_requests=1000,
            block_size=16,
            max_model_len=4096,
            details={"handover_port": str(port)},
        )
        self.session = InstanceSession(self._settings, registration, self._on_event)
        await self.session.start()
        self._channel.tell("registered", self.session.instance_id)

    def close(self) -> None:
        self._handovers.close()

    @property
    def num_held(self) -> int:
        return self.session.num_held + len(self._reserved) + len(self._running) + len(self._prefilling)

    async def go_round(self) -> None:
        while True:
            await asyncio.sleep(self._spec.step_s)
            now = time.monotonic()
            woke = now - self._ticked_at > WOKE_AFTER_S
            self._ticked_at = now
            self.session.alive({"running": len(self._running)})
            self._step(BURST_TOKENS if woke else 1)
            self._prefill()
            self._give_up(now)

    def datagram_received(self, data: bytes, addr: object) -> None:
        request_id, _, epoch = data.decode().partition(" ")
        run = request_id, int(epoch)
        sequence = self._reserved.pop(run, None)
        if sequence is not None:
            self._decode(sequence)
        else:
            self._early[run] = time.monotonic()

    def _on_event(self, event: InstanceEvent) -> None:
        now = time.monotonic()
        if isinstance(event, PrefillAssigned):
            if event.epoch > 1:
                self._channel.tell("assigned", event.request.request_id, event.epoch, self.session.instance_id, now)
            self._prefilling.append(event)
        elif isinstance(event, DecodeAssigned):
            sequence = Sequence(event.request, event.epoch, now)
            if self._early.pop(sequence.run, None) is not None:
                self._decode(sequence)
            else:
                self._reserved[sequence.run] = sequence
        elif isinstance(event, Dropped):
            run = event.request_id, event.epoch
            self._reserved.pop(run, None)
            self._running.pop(run, None)
            self._prefilling = [p for p in self._prefilling if (p.request.request_id, p.epoch) != run]
        elif isinstance(event, LeaseLost):
            for held in (self._reserved, self._running, self._early, self._prefilling):
                held.clear()
            self._channel.tell("registered", event.new_instance_id)

    def _prefill(self) -> None:
        """The first token of each prompt, and its handover."""
        outputs = []
        for event in self._prefilling:
            request, epoch = event.request, event.epoch
            if event.decode_instance == self.session.instance_id:
                self._decode(Sequence(request, epoch, 0.0))
                continue
            sequence = Sequence(request, epoch, 0.0)
            first = sequence.step()
            # An end is decode's to say, which gives the first token again.
            outputs.append(Output(first.request_id, epoch, first.index, first.token_ids))
            if "handover_port" in event.decode_fields:
                address = "127.0.0.1", int(event.decode_fields["handover_port"])
                self._handovers.sendto(f"{request.request_id} {epoch}".encode(), address)
        self.session.publish(outputs)
        for output in outputs:
            self.session.release(output.request_id, output.epoch)
        self._prefilling.clear()
        self.session.set_room(ROOM)

    def _decode(self, sequence: Sequence) -> None:
        self._running[sequence.run] = sequence
        self.session.step(sequence.request_id, sequence.epoch, {"lane": "none"})

    def _step(self, count: int) -> None:
        outputs = []
        for run, sequence in list(self._running.items()):
            outputs.append(sequence.step(count))
            if outputs[-1].finish_reason is not None:
                del self._running[run]
        self.session.publish(outputs)

    def _give_up(self, now: float) -> None:
        for run, sequence in list(self._reserved.items()):
            if now - sequence.since > HANDOVER_TIMEOUT_S:
                del self._reserved[run]
                self.session.give_back(*run, "its KV did not come", retry=True)
        for run, since in list(self._early.items()):
            if now - since > 2 * HANDOVER_TIMEOUT_S:
                del self._early[run]


async def run(spec: ChildSpec, settings: SchedulerSettings, channel: Channel, commands: asyncio.Queue[list]) -> None:
    async def attempt() -> ZeroWorkInstance:
        instance = ZeroWorkInstance(spec, settings, channel)
        try:
            await instance.start()
        except BaseException:
            instance.close()
            raise
        return instance

    instance = await start(attempt)
    tasks = [
        asyncio.create_task(instance.go_round()),
        asyncio.create_task(tell_stats(channel, lambda: instance.num_held)),
    ]
    channel.tell("ready")
    while True:
        command, *_ = await commands.get()
        if command == "leave":
            await instance.session.drain()
            await instance.session.until_empty()
            break
        if command == "close":
            break
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await instance.session.close()
    instance.close()
    channel.tell("closed")
    await channel.flush()
