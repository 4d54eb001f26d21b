"""claim → prefill or decode → publish, for engines that we drive.

One thread goes round: what came from the scheduler, what came from the messengers, one engine step, outputs out. It
never waits for Redis or a peer; when there is nothing to do it sleeps until somebody wakes it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from engine.decode_leg import DecodeLeg
from engine.port import EngineDriver, TokensOut
from engine.prefill_leg import PrefillLeg
from engine.ranks import RankGroup
from kv_transfer.endpoint import endpoints_to_text
from kv_transfer.events import TransferEvent
from kv_transfer.options import TransferOptions
from splitwise_sched.errors import Fenced
from splitwise_sched.records import DecodeAssigned, Dropped, InstanceEvent, LeaseLost, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.sync import Instance
from splitwise_sched.types import Output, Role

logger = logging.getLogger(__name__)

IDLE_S = 0.1
# Who has news says so, and is asked then. So often all are asked in any case, for the lease record needs figures.
LOOK_S = 0.01
CLAIM_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """
    Attributes:
        name: of the instance; its id is this and a boot nonce.
        max_waiting_tokens: prompt tokens that are claimed ahead of their computation; beyond that, requests stay in
            the queue for whoever has room first.
        details: further fields of the lease record.
    """

    name: str
    role: Role
    max_waiting_tokens: int = 2048
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class RunnerStats:
    """Plain counters since start; read from any thread."""

    num_steps: int = 0
    num_prefilled: int = 0
    num_finished: int = 0
    num_output_tokens: int = 0
    num_dropped: int = 0
    num_leases_lost: int = 0


class Runner:
    """One instance: an engine, its messengers, its place in the topic.

    ``start`` raises what can be wrong at start; ``run`` goes round until ``stop`` is called from any thread or signal
    handler; ``close`` ends the rest. The engine stays the caller's.
    """

    def __init__(
        self, engine: EngineDriver, settings: SchedulerSettings, transfer: TransferOptions, options: RunnerOptions
    ) -> None:
        self.stats = RunnerStats()
        self.engine = engine
        self.role = options.role
        self.went_round_at = time.monotonic()
        self._options = options
        self._settings = settings
        self._wake = threading.Event()
        # Set in any thread, and so never made of what it was before.
        self._must_look = True
        self._look_at = 0.0
        self._stop = threading.Event()
        self._drain_until: float | None = None
        self._is_draining = False
        self.ranks = RankGroup(engine.kv_pools, transfer, name=options.name, on_event=self._on_news)
        self.instance: Instance | None = None
        self._prefill: PrefillLeg
        self._decode: DecodeLeg

    def start(self) -> None:
        """Start the messengers and register. Raises SplitwiseError or KVTransferError; nothing runs on after that."""
        self.ranks.start()
        try:
            instance = Instance(self._settings, self._registration(), on_event=self._on_news)
            instance.start()
        except BaseException:
            self.ranks.close()
            raise
        self.instance = instance
        timeout_s = self._settings.scheduler_ttl
        self._prefill = PrefillLeg(self.engine, self.ranks, instance, timeout_s)
        self._decode = DecodeLeg(self.engine, self.ranks, instance, timeout_s)

    def drain(self, timeout_s: float) -> None:
        """Take nothing more, finish what is held, then end ``run``; end it after ``timeout_s`` in any case."""
        self._drain_until = time.monotonic() + timeout_s
        self._wake.set()

    def change_role(self, role: Role, timeout_s: float) -> None:
        """Finish what is held, for ``timeout_s`` at most, then go on in another role. Any thread may call this."""
        assert self.instance is not None, "start() comes first"
        self.role = role
        self.instance.change_role(role, timeout_s)

    def stop(self) -> None:
        """End ``run`` after this round; ``close`` hands back what is held."""
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """Hand back what is held, leave the topic, end the messengers. Idempotent."""
        if self.instance is not None:
            self.instance.close()
            self.instance = None
            self.ranks.close()

    def run(self) -> None:
        """Go round until ``stop``. Raises Fenced when the lease was lost and no new one can be had."""
        while not self._stop.is_set() and not self._is_drained():
            if not self.go_round():
                self._wake.wait(IDLE_S)
                self._wake.clear()

    def _on_news(self) -> None:
        """Something came from the scheduler or a messenger; in any thread."""
        self._must_look = True
        self._wake.set()

    def _is_drained(self) -> bool:
        if self._drain_until is None:
            return False
        assert self.instance is not None
        if not self._is_draining:
            self._is_draining = True
            self.instance.drain()
            return False
        if time.monotonic() > self._drain_until:
            logger.warning("%d requests did not end in time and go back to the queue", self.instance.num_held)
            return True
        return self.instance.is_drained and not (self._prefill.runs or self._decode.runs)

    def go_round(self) -> bool:
        """Once; returns whether the engine computed."""
        assert self.instance is not None, "start() comes first"
        self.went_round_at = now = time.monotonic()
        outputs: list[Output] = []
        if self._must_look or now >= self._look_at:
            self._look(now, outputs)
        if self._decode.has_waiting:
            self._decode.reserve_waiting()
        computes = self.engine.has_work()
        if computes:
            self.stats.num_steps += 1
            for event in self.engine.step():
                if isinstance(event, TokensOut):
                    if (output := self._on_tokens(event)) is not None:
                        outputs.append(output)
                elif event.key in self._prefill.runs:
                    self._prefill.on_blocks(event)
        if outputs:
            self.instance.publish(outputs)
        return computes

    def _look(self, now: float, outputs: list[Output]) -> None:
        """What came from the scheduler and the messengers, and what they have to know."""
        assert self.instance is not None
        # First: what comes during the look may be seen only by the next.
        self._must_look, self._look_at = False, now + LOOK_S
        for event in self.instance.poll(self._room(), self.load):
            self._on_scheduler(event)
            self._must_look = True
        for ended in self.ranks.poll():
            if (output := self._on_transfer(ended)) is not None:
                outputs.append(output)
            self._must_look = True

    # ---- events --------------------------------------------------------------------------------------------------

    def _on_scheduler(self, event: InstanceEvent) -> None:
        assert self.instance is not None
        if isinstance(event, PrefillAssigned):
            if event.decode_instance == self.instance.instance_id:
                self._decode.run_whole(event.key, event)
            else:
                self._prefill.assign(event.key, event)
        elif isinstance(event, DecodeAssigned):
            self._decode.assign(event.key, event)
        elif isinstance(event, Dropped):
            self.stats.num_dropped += 1
            self._prefill.drop(event.key, event.reason)
            self._decode.drop(event.key, event.reason)
        else:
            self._on_lease_lost(event)

    def _on_lease_lost(self, event: LeaseLost) -> None:
        self.stats.num_leases_lost += 1
        for key in list(self._prefill.runs):
            self._prefill.drop(key, event.reason)
        for key in list(self._decode.runs):
            self._decode.drop(key, event.reason)
        if event.new_instance_id is None:
            raise Fenced(f"this instance lost its place in the topic and cannot come back: {event.reason}")

    def _on_transfer(self, event: TransferEvent) -> Output | None:
        if event.transfer_id in self._prefill.runs:
            self._prefill.on_transfer(event)
            return None
        if event.transfer_id in self._decode.runs:
            return self._decode.on_transfer(event)
        return None

    def _on_tokens(self, event: TokensOut) -> Output | None:
        output: Output | None
        if (run := self._decode.runs.get(event.key)) is not None:
            if run.decoding_at is None:
                # Its prompt is computed: there is more room.
                self._must_look = True
            output = self._decode.on_tokens(run, event)
        elif event.key in self._prefill.runs:
            self.stats.num_prefilled += 1
            self._must_look = True
            output = self._prefill.on_tokens(event)
        else:
            return None
        self.stats.num_output_tokens += len(event.token_ids)
        self.stats.num_finished += event.finish_reason is not None
        return output

    # ---- what others see -----------------------------------------------------------------------------------------

    def _room(self) -> int:
        waiting = self._prefill.waiting_tokens + self._decode.waiting_tokens
        return CLAIM_AT_ONCE if waiting < self._options.max_waiting_tokens else 0

    def load(self) -> dict[str, int | float | str]:
        """What the instance holds now; goes into its lease record."""
        load = self.engine.load()
        avoided = self.instance.avoided_pairs if self.instance is not None else ()
        return {
            "running": load.num_running,
            "waiting": load.num_waiting,
            "free_blocks": load.num_free_blocks,
            "avoided_pairs": len(avoided),
        }

    def totals(self) -> dict[str, int]:
        """Counters since start."""
        num_pairs_avoided = self.instance.num_pairs_avoided if self.instance is not None else 0
        return {
            **asdict(self.stats),
            "num_preempted": self.engine.load().num_preempted_total,
            "num_pairs_avoided": num_pairs_avoided,
        }

    def _registration(self) -> Registration:
        spec, layout = self.engine.spec, self.engine.kv_layout
        return Registration(
            name=self._options.name,
            role=self._options.role,
            model=spec.model,
            must_match={f"kv.{name}": value for name, value in layout.compatibility().items()},
            capacity_tokens=spec.num_blocks * spec.block_size,
            capacity_requests=spec.max_num_seqs,
            block_size=spec.block_size,
            max_model_len=spec.max_model_len,
            details={
                **self._options.details,
                "kv_endpoints": endpoints_to_text(self.ranks.endpoints),
            },
        )
