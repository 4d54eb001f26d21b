"""What vLLM's workers do at preemptions and aborts, with two messengers over tcp; there is no vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from engine.vllm.scheduler_side import OpenReceive, OpenSend, SendBlocks, StepPlan
from engine.vllm.worker_side import Ended, WorkerSide
from kv_transfer import RankEndpoint, TransferOptions
from tests.integration.kv_memory import make_pool, view_of
from tests.integration.kv_rank import LAYOUT, pattern

OPTIONS = TransferOptions(protocols=("tcp",), checksum="crc32")
WAIT_S = 20.0


class Rank:
    """One rank's pool and worker side, and the steps that vLLM would make of them."""

    def __init__(self, name: str, seed: int) -> None:
        self.pool = make_pool(LAYOUT, OPTIONS)
        self.view = view_of(self.pool, LAYOUT)
        self.view[:] = pattern(LAYOUT, seed)
        self.worker = WorkerSide(self.pool, OPTIONS, name=name, timeout_s=WAIT_S)
        self.endpoint: RankEndpoint = self.worker.start()
        self.ended = Ended()

    def step(self, plan: StepPlan | None = None, finished: frozenset[str] = frozenset()) -> Ended:
        """All that was reported until then."""
        plan = plan or StepPlan()
        if plan.revoke:
            self.worker.revoke(plan.revoke)
        self.worker.before_forward(plan)
        self.worker.after_forward(plan)
        ended = self.worker.take_ended(set(finished))
        self.ended.sent |= ended.sent
        self.ended.received |= ended.received
        self.ended.failed |= ended.failed
        return self.ended

    def step_until(self, condition: Callable[[], bool]) -> Ended:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            self.step()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return self.ended

    def step_until_received(self) -> Ended:
        return self.step_until(lambda: bool(self.ended.received))

    def step_until_sent(self) -> Ended:
        return self.step_until(lambda: bool(self.ended.sent))

    def close(self) -> None:
        self.worker.close()
        self.pool.close()


@pytest.fixture
def prefill() -> Iterator[Rank]:
    rank = Rank("p", 1)
    yield rank
    rank.close()


@pytest.fixture
def decode() -> Iterator[Rank]:
    rank = Rank("d", 2)
    yield rank
    rank.close()


def send(transfer_id: str, *chunks: tuple[int, ...], num_blocks: int = 4) -> StepPlan:
    """The first step of request ``r``; it is whole when the chunks are all of its blocks."""
    plan, index = StepPlan(open_sends=[OpenSend("r", transfer_id, num_blocks)]), 0
    for chunk in chunks:
        is_last = index + len(chunk) == num_blocks
        plan.send_blocks.append(SendBlocks("r", transfer_id, index, chunk, is_last))
        index += len(chunk)
    return plan


def receive(transfer_id: str, source: Rank, *block_ids: int) -> StepPlan:
    return StepPlan(receives=[OpenReceive("r", transfer_id, (source.endpoint,), block_ids, True)])


def under_way(prefill: Rank, decode: Rank) -> None:
    """Half of a transfer is offered, and decode has it."""
    prefill.step(send("t", (1, 2)))
    decode.step(receive("t", prefill, 3, 4, 5, 6))
    wanted = pattern(LAYOUT, 1)[[1, 2]]
    decode.step_until(lambda: np.array_equal(decode.view[[3, 4]], wanted))


FAILED = Ended(received={"r"}, failed={"r"})


def test_a_preempted_prefill_is_read_by_nobody_and_its_end_is_not_reported_when_the_request_ends(prefill, decode):
    under_way(prefill, decode)
    prefill.step(StepPlan(revoke=["r"]))
    assert decode.step_until_received() == FAILED
    # vLLM has freed the request by then: to hear of its send would end vLLM's engine.
    assert prefill.step(finished=frozenset({"r"})) == Ended()


def test_what_a_preempted_prefill_sends_anew_is_kept_until_decode_has_it(prefill, decode):
    prefill.step(send("t1", (1, 2)))
    prefill.step(StepPlan(revoke=["r"]))
    prefill.step(send("t2", (5, 6, 7, 8)))
    assert prefill.step(finished=frozenset({"r"})) == Ended()
    decode.step(receive("t2", prefill, 9, 10, 11, 12))
    assert decode.step_until_received() == Ended(received={"r"})
    assert np.array_equal(decode.view[[9, 10, 11, 12]], pattern(LAYOUT, 1)[[5, 6, 7, 8]])
    assert prefill.step_until_sent() == Ended(sent={"r"})


def test_a_decode_that_asks_for_a_preempted_prefill_is_told_at_once(prefill, decode):
    prefill.step(send("t", (1, 2)))
    prefill.step(StepPlan(revoke=["r"]))
    decode.step(receive("t", prefill, 3, 4, 5, 6))
    assert decode.step_until_received() == FAILED


def test_an_abort_at_decode_ends_its_load_and_lets_prefill_free_its_blocks(prefill, decode):
    under_way(prefill, decode)
    decode.step(StepPlan(abort=["r"]))
    assert decode.step_until_received() == FAILED
    # Prefill goes on to its end, and vLLM waits for the send's.
    prefill.step_until(lambda: prefill.worker.stats.num_failed == 1)
    prefill.step(StepPlan(send_blocks=[SendBlocks("r", "t", 2, (7, 8), True)]))
    assert prefill.ended == Ended()
    assert prefill.step(finished=frozenset({"r"})) == Ended(sent={"r"})


def test_an_abort_at_prefill_ends_decodes_load_and_is_reported_when_nobody_reads(prefill, decode):
    under_way(prefill, decode)
    prefill.step(StepPlan(abort=["r"]), finished=frozenset({"r"}))
    assert decode.step_until_received() == FAILED
    assert prefill.step_until_sent() == Ended(sent={"r"})


def test_a_prefill_that_goes_away_in_mid_transfer_fails_decodes_load(prefill, decode):
    under_way(prefill, decode)
    prefill.worker.close()
    assert decode.step_until_received() == FAILED
