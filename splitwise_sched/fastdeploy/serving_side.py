"""The side that an engine serves: an instance of the topic, its admission, and what the engine says of each run."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from splitwise_sched.errors import ConfigError, InvalidRequest, StoreUnavailable
from splitwise_sched.fastdeploy.admission import Offer, num_admitted
from splitwise_sched.fastdeploy.config import SplitWiseSchedulerConfig
from splitwise_sched.fastdeploy.messages import Run, output_of, run_of
from splitwise_sched.fastdeploy.objects import Classes
from splitwise_sched.fastdeploy.pairing import MAX_DISAGGREGATED_CHARS, disaggregate_info
from splitwise_sched.fastdeploy.plain import plain
from splitwise_sched.fastdeploy.runs import EarlyResults, Runs
from splitwise_sched.records import DecodeAssigned, Dropped, InstanceEvent, LeaseLost, PrefillAssigned, Registration
from splitwise_sched.sync import Instance
from splitwise_sched.types import Output, Role

logger = logging.getLogger(__name__)

BLOCK_SIZE = 64
CAPACITY_REQUESTS = 1 << 20
# What a class that is not ours may make of a dict that it does not like.
FROM_DICT_ERRORS = (KeyError, TypeError, ValueError, AttributeError, IndexError)


class ServingSide:
    """An instance for an engine whose loop does not always come round: the lease is renewed by a thread of its own.

    The interface has no call that a busy or idle engine makes at all times, so a wedged one is told by its silence: a
    run of which it says nothing for ``release_load_expire_period`` is taken from it. Methods may be called from any
    thread.
    """

    def __init__(self, config: SplitWiseSchedulerConfig, classes: Classes) -> None:
        self.nodeid = config.nodeid
        self.role = ""
        self.host = ""
        self._config = config
        self._classes = classes
        self._lock = threading.RLock()
        self._runs = Runs()
        self._early = EarlyResults()
        self._num_wanted = 0
        self._was_asked = False
        self._instance: Instance | None = None
        self._wake = threading.Event()
        self._is_ending = False
        self._heart: threading.Thread | None = None

    @property
    def instance_id(self) -> str:
        """Of this instance in Redis; "" before ``start``."""
        return self._instance.instance_id if self._instance is not None else ""

    def start(self, role: str, host: str, disaggregated: Any) -> None:
        """See SplitWiseScheduler.start."""
        registration = self._registration(role, host, disaggregated)
        # What decode is assigned matters at once: prefill may have told its engine already.
        instance = Instance(self._config.settings(), registration, self._wake.set if role == Role.DECODE else None)
        instance.start()
        self.role, self.host, self._instance = role, host, instance
        self._is_ending = False
        self._heart = threading.Thread(target=self._beat, name="splitwise-heartbeat", daemon=True)
        self._heart.start()

    def close(self) -> None:
        """Idempotent; what is held goes back to the queue."""
        self._is_ending = True
        self._wake.set()
        if self._heart is not None:
            self._heart.join(10)
            self._heart = None
        with self._lock:
            instance, self._instance = self._instance, None
            self._runs.clear()
        if instance is not None:
            instance.close()

    def _registration(self, role: str, host: str, disaggregated: Any) -> Registration:
        if role not in tuple(Role):
            raise ConfigError(f"role is {role!r}: it must be prefill, decode or mixed")
        if role != Role.MIXED and not isinstance(disaggregated, (Mapping, NoneType)):
            raise ConfigError(
                f"disaggregated is {disaggregated!r}: it must be a dict that tells peers how to reach this"
            )
        text = json.dumps(plain(disaggregated or {}, "disaggregated"))
        if len(text) > MAX_DISAGGREGATED_CHARS:
            raise ConfigError(
                f"disaggregated takes {len(text)} characters as JSON, it may take {MAX_DISAGGREGATED_CHARS}"
            )
        capacity = self._config.kv_capacity_tokens
        return Registration(
            name=self.nodeid,
            role=Role(role),
            model=self._config.model,
            # A mixed instance of this interface takes no KV from others: it and they need topics of their own.
            must_match={"roles": "mixed" if role == Role.MIXED else "prefill and decode"},
            capacity_tokens=capacity,
            capacity_requests=CAPACITY_REQUESTS,
            block_size=BLOCK_SIZE,
            max_model_len=self._config.max_model_len or capacity,
            details={"host": host, "disaggregated": text},
        )

    # ---- what the engine calls -----------------------------------------------------------------------------------

    def get(self, offer: Offer) -> list[Any]:
        """Requests that the engine takes now; those that are here but not admitted stay, in order."""
        with self._lock:
            if self._instance is None:
                return []
            self._drain()
            count = num_admitted((run.num_input_tokens for run in self._runs.waiting), offer)
            runs = [self._runs.waiting.popleft() for _ in range(count)]
            requests = [request for request in map(self._admit, runs) if request is not None]
            self._num_wanted = 0 if offer.is_nothing else offer.batch - len(requests)
            self._was_asked = True
            self._claim()
            return requests

    def _admit(self, run: Run) -> Any:
        try:
            request = self._classes.request.from_dict(run.data)
        except FROM_DICT_ERRORS as exc:
            self._refuse(run, f"{self._classes.request.__name__}.from_dict does not take it: {exc!r}")
            return None
        run.told_at = time.monotonic()
        return request

    def put(self, results: Sequence[Any]) -> None:
        """Outputs of the engine. What belongs to a run that was taken from this instance is left out."""
        with self._lock:
            if self._instance is None:
                return
            self._publish(results)

    def _publish(self, results: Sequence[Any]) -> None:
        assert self._instance is not None
        outputs = []
        for result in results:
            name = str(result.request_id)
            run = self._runs.get(name)
            if run is not None:
                outputs.append(self._output(run, result))
            elif self.role == Role.DECODE and not self._runs.is_over(name):
                self._early.hold(time.monotonic(), name, result)
            else:
                logger.debug("no run %r (any more): its result is left out", name)
        self._instance.publish([output for output in outputs if output is not None])

    def _output(self, run: Run, result: Any) -> Output | None:
        assert self._instance is not None
        is_prefill = self.role == Role.PREFILL
        is_new = run.is_new
        try:
            output = output_of(run, result, is_prefill=is_prefill)
        except InvalidRequest as exc:
            self._refuse(run, str(exc))
            return None
        run.told_at = time.monotonic()
        if output.finish_reason is not None:
            self._runs.drop(run.request_id, run.epoch)
        elif is_prefill:
            run.is_handed_over = True
        if is_new and not is_prefill and output.finish_reason is None:
            self._instance.step(run.request_id, run.epoch, {})
        return output

    # ---- what the scheduler tells --------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Take in what came. Nothing is claimed meanwhile: how much there is room for is not known before."""
        self._poll(0)

    def _claim(self) -> None:
        """Let the queue give what the engine asked for, less what waits here already."""
        self._poll(self._num_wanted - len(self._runs.waiting))

    def _poll(self, room: int) -> None:
        assert self._instance is not None
        load = {"waiting": len(self._runs.waiting), "running": len(self._runs) - len(self._runs.waiting)}
        for event in self._instance.poll(room, load):
            self._take(event)

    def _take(self, event: InstanceEvent) -> None:
        if isinstance(event, Dropped):
            self._runs.drop(event.request_id, event.epoch)
        elif isinstance(event, LeaseLost):
            logger.warning("%d requests are dropped: %s", len(self._runs), event.reason)
            self._runs.clear()
            if event.new_instance_id is None:
                logger.error("this instance takes no more requests: %s", event.reason)
        else:
            self._assign(event)

    def _assign(self, event: PrefillAssigned | DecodeAssigned) -> None:
        assert self._instance is not None
        is_decode = isinstance(event, DecodeAssigned)
        peer = event.prefill_fields if isinstance(event, DecodeAssigned) else event.decode_fields
        info = None
        if self.role != Role.MIXED:
            info = disaggregate_info(peer.get("disaggregated", ""), peer.get("host", ""), self.host)
            if info is None:
                self._give_back(event, "its peer has gone, or announced no disaggregated info")
                return
        elif peer:
            self._give_back(event, "a mixed instance of this interface keeps its requests")
            return
        try:
            run = run_of(event.request, event.epoch, starts_here=not is_decode, info=info)
        except InvalidRequest as exc:
            self._instance.give_back(event.request.request_id, event.epoch, str(exc), retry=False)
            return
        self._runs.add(run, waits=not is_decode or self._config.decode_gets_requests)
        self._publish(self._early.take(run.name))

    def _give_back(self, event: PrefillAssigned | DecodeAssigned, why: str) -> None:
        assert self._instance is not None
        self._instance.give_back(event.request.request_id, event.epoch, why, retry=True)

    def _refuse(self, run: Run, why: str) -> None:
        assert self._instance is not None
        logger.warning("%s ends with an error: %s", run.name, why)
        self._runs.drop(run.request_id, run.epoch)
        self._instance.give_back(run.request_id, run.epoch, why, retry=False)

    # ---- the heartbeat -------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        period_s = self._config.settings().instance_lease_s / 3
        due = 0.0
        while True:
            self._wake.wait(period_s)
            self._wake.clear()
            if self._is_ending:
                return
            try:
                with self._lock:
                    if self._instance is None:
                        return
                    self._drain()
                    if (now := time.monotonic()) >= due:
                        due = now + period_s
                        self._release_silent()
                        if not self._was_asked:
                            # An engine that asks for nothing is not given what could run elsewhere.
                            self._num_wanted = 0
                        self._was_asked = False
                    self._claim()
            except StoreUnavailable as exc:
                logger.error("the heartbeat of %s ends: %s", self.nodeid, exc)
                return

    def _release_silent(self) -> None:
        assert self._instance is not None
        period_s = self._config.release_load_expire_period
        for run in self._runs.forget_silent(time.monotonic(), period_s):
            if run.is_handed_over:
                self._instance.release(run.request_id, run.epoch)
                continue
            why = f"its engine told nothing of it for {period_s:g} s"
            logger.warning("%s is taken from this engine: %s", run.name, why)
            self._instance.give_back(run.request_id, run.epoch, why, retry=True)
