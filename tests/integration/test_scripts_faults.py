"""The comparison of scripts and model notices a script with a fault: each is planted, and has to be found."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase

from splitwise_sched import connection
from tests.integration.test_scripts_model import loop_of, patient_texts, play, run_property, store_for, with_short_queue
from tests.scripts_topic import Parted

PREFILLED = [("submit", "r0", "f0", 0), ("claim", "p0", 1), ("bind", "p0"), ("take", "d0")]
RUN = ("r0", 1, "d0-0")
# Whose run was taken away, and who goes on with it all the same.
LOST_AND_BOUND_AGAIN = [
    *PREFILLED, ("give_back", RUN, True), ("resubmit", "r0", False), ("claim", "p0", 1), ("bind", "p0"),
]  # fmt: skip

# Script, what stands in it, what stands there instead, a sequence of operations that tells the two apart.
FAULTS: dict[str, tuple[str, str, str, list[tuple[Any, ...]]]] = {
    "step does not look at the epoch": (
        "step", "r.epoch ~= ARGV[3] or ", "",
        [*LOST_AND_BOUND_AGAIN, ("step", RUN)],
    ),
    "finish does not look at the epoch": (
        "finish", "if not r or r.epoch ~= ARGV[3] then", "if not r then",
        [*LOST_AND_BOUND_AGAIN, ("finish", RUN)],
    ),
    "give_back does not look at whose run it is": (
        "give_back", "is_with(ARGV[4], r)", "is_live(r.state)",
        [*PREFILLED, ("step", RUN), ("give_back", ("r0", 1, "p0-0"), True)],
    ),
    "step leaves the queue's entry": (
        "step", "remove_entry(r)\nredis.call('HDEL', KEYS[1], 'queue_entry', 'queue')\n", "",
        [*PREFILLED, ("step", RUN)],
    ),
    "entries are deleted but stay pending": (
        "common", "  redis.pcall('XACK', queue, 'prefill', r.queue_entry)\n", "",
        [*PREFILLED, ("step", RUN)],
    ),
    "let_go keeps the reservation": (
        "common", "    reserve(r.decode, -number(r.kv_reserved), -1)\n", "",
        [*PREFILLED, ("step", RUN), ("finish", RUN)],
    ),
    "prefill is not told that its run is over": (
        "common", "    drop_from(r.prefill, id, r.epoch, why)\n", "",
        [*PREFILLED, ("cancel", "r0")],
    ),
    "register again forgets reservations": (
        "register", "if redis.call('EXISTS', KEYS[1]) == 1 then", "if false then",
        [*PREFILLED, ("register", "d0")],
    ),
    "resubmit replaces the body of a request that somebody works on": (
        "resubmit", "UNLINK', KEYS[5])\n  if is_live", "RENAME', KEYS[5], KEYS[6])\n  if is_live",
        [*PREFILLED, ("resubmit", "r0", False)],
    ),
    "bind takes no notice of an earlier bind": (
        "bind", "r.state == 'prefill' and r.prefill == me", "false",
        [*PREFILLED, ("bind_again", "p0")],
    ),
    "reap forgets what was claimed and not bound": (
        "reap", "take_claims('queue')\n", "",
        [("submit", "r0", "f0", 0), ("claim", "p0", 1), ("lapse", "p0"), ("reap", "p0", 100)],
    ),
    "orphans are those of a front end that has its lease": (
        "orphans", "if redis.call('EXISTS', KEYS[1]) == 1 then return {0, '0'} end\n", "",
        [*PREFILLED, ("cancel_orphans", "f0")],
    ),
    "orphans are everybody's requests": (
        "orphans", "redis.call('HGET', P .. 'request:' .. id, 'frontend') == me", "true",
        [*PREFILLED, ("submit", "r1", "f1", 0), ("frontend_dies", "f0"), ("cancel_orphans", "f0")],
    ),
    "front end that woke does not get its requests back": (
        "resubmit", "redis.call('HGET', KEYS[1], 'orphaned')", "false",
        [*PREFILLED, ("frontend_dies", "f0"), ("cancel_orphans", "f0"), ("frontend_wakes", "f0"),
         ("resubmit", "r0", False)],
    ),
    "recall takes away a run that it has not heard of": (
        "resubmit", "r.epoch == ARGV[5] and (r.state", "(r.state",
        [*LOST_AND_BOUND_AGAIN, ("recall_of", "r0", 1)],
    ),
    "front end that closed is not swept": (
        "orphans", "if is_clean then redis.call('ZREM', KEYS[2], me) end\n",
        "", [*PREFILLED, ("frontend_dies", "f0"), ("cancel_orphans", "f0"), ("cancel_orphans", "f0")],
    ),
}  # fmt: skip
FOUND_AT_RANDOM = ("step leaves the queue's entry", "let_go keeps the reservation", "finish does not look at the epoch")


# What is wrong in the waiting room, which is found only when requests come into it.
ROOM_FAULTS = {
    "weights are not looked at": ("cost / math.max(r and tonumber(r.weight) or 1, 0.001)", "cost"),
    "a flow that was idle has saved its share up": ("math.max(now, ended)", "ended"),
    "a flow that comes back has not been served before": ("math.max(now, ended)", "now"),
    "a class that is empty stays in its ring": (
        "if redis.call('EXISTS', P .. 'waiting:' .. r.class) == 0 then redis.call('ZREM', P .. 'waiting', r.class) end",
        "",
    ),
    "who leaves is counted on": (
        "  if redis.call('ZREM', room_of(r.class, r.tenant), id) == 0 then return end\n  count('waiting', -1)\n",
        "  if redis.call('ZREM', room_of(r.class, r.tenant), id) == 0 then return end\n",
    ),
}


def plant(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Every Store that is made from here on runs its scripts with the fault."""
    script, right, wrong, _ = FAULTS[fault]
    texts = patient_texts()
    shared = {name: text for name, text in texts.items() if right in text}
    chosen = shared if script == "common" else {script: texts[script]}
    assert chosen and all(text.count(right) == 1 for text in chosen.values()), f"{script} no longer has {right!r} once"
    faulty = {**texts, **{name: text.replace(right, wrong) for name, text in chosen.items()}}
    monkeypatch.setattr(connection, "script_texts", lambda: faulty)


def play_once(server: Any, operations: list[tuple[Any, ...]]) -> None:
    store = store_for(server)
    with loop_of(store) as loop:
        loop.run_until_complete(play(store, operations))


@pytest.mark.parametrize("fault", FAULTS)
def test_sequence_is_all_right_without_the_fault(redis_server, monkeypatch, fault):
    texts = patient_texts()
    monkeypatch.setattr(connection, "script_texts", lambda: texts)
    play_once(redis_server, FAULTS[fault][-1])


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_told_by_a_sequence(redis_server, monkeypatch, fault):
    plant(monkeypatch, fault)
    with pytest.raises(Parted):
        play_once(redis_server, FAULTS[fault][-1])


@pytest.mark.parametrize("fault", FOUND_AT_RANDOM)
def test_fault_is_found_by_random_sequences(redis_server, monkeypatch, fault):
    plant(monkeypatch, fault)
    with pytest.raises(Parted):
        run_property(redis_server, 150, (Phase.generate,))


@pytest.mark.parametrize("fault", ROOM_FAULTS)
def test_fault_in_the_waiting_room_is_found_by_random_sequences(redis_server, monkeypatch, fault):
    right, wrong = ROOM_FAULTS[fault]
    texts = with_short_queue(patient_texts())
    assert texts["submit"].count(right) == 1
    faulty = {name: text.replace(right, wrong) for name, text in texts.items()}
    monkeypatch.setattr(connection, "script_texts", lambda: faulty)
    with pytest.raises(Parted):
        run_property(redis_server, 150, (Phase.generate,), short_queue=2)
