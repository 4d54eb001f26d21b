"""Any sequence of operations does to Redis what it does to the model; and scripts with a fault are told apart."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from splitwise_sched import connection
from splitwise_sched.store import Store
from tests.integration.toy import settings_for
from tests.scripts_lab import MAX_ATTEMPTS, MAX_SIZE, Lab
from tests.scripts_topic import PRIORITIES, TENANTS

NUM_EXAMPLES = int(os.environ.get("SPLITWISE_SCRIPT_EXAMPLES", "100"))

_frontend = st.sampled_from(["f0", "f0", "f0", "f1"])
_rank = st.sampled_from([0, 0, 0, 0, 0, 1, 1, 2, 3])
_size = st.sampled_from([0, 0, 0, 0, 1, 1, 2])
_flow = (_rank, _frontend, _size, st.sampled_from(sorted(PRIORITIES)), st.sampled_from(TENANTS))
_limit = st.sampled_from([1, 2, 100])
# What happens, how often, and the arguments of it.
_OPERATIONS: dict[str, tuple[int, tuple[st.SearchStrategy[Any], ...]]] = {
    "submit": (13, (_rank, _frontend, _size)),
    "submit_as": (12, _flow),
    "cancel_waiting": (4, (st.integers(0, 3),)),
    "claim": (6, (_rank, st.integers(1, 3))),
    "bind": (10, (_rank,)),
    "take": (4, (_rank,)),
    "step": (20, (_rank,)),
    "finish": (10, (_rank,)),
    "resubmit": (12, (_rank, st.booleans())),
    "recall": (2, (_rank,)),
    "submit_again": (2, (_rank,)),
    "bind_again": (5, (_rank,)),
    "cancel": (3, (_rank,)),
    "spill": (4, (_rank,)),
    "late": (3, (_rank,)),
    "expire": (3, ()),
    "lapse": (6, (_rank,)),
    "reap": (6, (_rank, _limit)),
    "leave": (4, (_rank, _limit)),
    "register": (7, (_rank,)),
    "renew": (2, (_rank,)),
    "drain": (2, (_rank,)),
    "give_back": (6, (_rank, st.booleans())),
    "give_back_claims": (2, (_rank,)),
    "frontend_dies": (3, (_frontend,)),
    "cancel_orphans": (4, (_frontend,)),
    "audit": (2, ()),
    "frontend_wakes": (4, (_frontend,)),
    "forget": (1, ()),
}
_names = st.sampled_from([name for name, (weight, _) in _OPERATIONS.items() for _ in range(weight)])
_one = _names.flatmap(lambda name: st.tuples(st.tuples(st.just(name), *_OPERATIONS[name][1])))
_preferring = st.tuples(
    st.tuples(st.just("submit"), _rank, _frontend, _size, st.sampled_from(["d0", "p0", "p1", "m0"]), st.just("m0"))
)
# So many at a time that some have to wait for a place in the queue, which is given to one after the other.
_crowd = st.lists(st.tuples(st.just("submit_as"), *_flow), min_size=4, max_size=6)
_flowing = st.lists(
    st.tuples(st.just(("claim", 0, 1)), st.just(("bind", 0)), st.tuples(st.just("submit_as"), *_flow)), max_size=4
).map(lambda turns: [op for turn in turns for op in turn])
_served = st.tuples(
    st.tuples(st.just("claim"), _rank, st.integers(1, 3)),
    st.just(("bind", 0)),
    st.just(("take", 0)),
    st.just(("take", 1)),
)
_several = st.sampled_from([_one] * 9 + [_served] * 2 + [_preferring, _crowd, _flowing]).flatmap(
    lambda several: several
)
# Long ones as a rule; from short ones it can shrink to nothing.
OPERATIONS = st.sampled_from([0, 30, 30, 30]).flatmap(
    lambda n: st.lists(_several, min_size=n, max_size=n + 30).map(lambda parts: [op for part in parts for op in part])
)

_topics = itertools.count()


async def play(store: Store, operations: Sequence[tuple[Any, ...]], short_queue: int = 64) -> Lab:
    lab = Lab(store, short_queue)
    await lab.open()
    try:
        for operation in operations:
            await lab.do(operation)
        await lab.settle()
    finally:
        await lab.forget()
    return lab


def store_for(server: Any) -> Store:
    topic = f"scripts-{os.getpid()}-{next(_topics)}"
    return Store(settings_for(server, topic, scheduler_max_size=MAX_SIZE, scheduler_max_attempts=MAX_ATTEMPTS))


@contextmanager
def loop_of(store: Store) -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in which ``store`` is connected; hypothesis has no coroutines."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(store.connect())
        yield loop
    finally:
        loop.run_until_complete(store.close())
        loop.close()


def run_property(server: Any, num_examples: int, phases: Sequence[Phase], short_queue: int = 64) -> None:
    """Raises Parted with the shortest sequence found on which server and model part."""
    store = store_for(server)
    with loop_of(store) as loop:

        @seed(20)
        @settings(
            max_examples=num_examples, phases=phases, deadline=None, database=None, print_blob=False,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(OPERATIONS)
        def holds(operations: list[tuple[Any, ...]]) -> None:
            loop.run_until_complete(play(store, operations, short_queue))

        holds()


_real_texts = connection.script_texts


def patient_texts() -> dict[str, str]:
    """The scripts, where claims of several instances that wait for room do not look at how long they have waited."""
    texts = _real_texts()
    patient = texts["bind"].replace("local SLACK_MS, SAID_MS = 100, 50\n", "local SLACK_MS, SAID_MS = 1e15, 50\n")
    assert patient != texts["bind"]
    return {**texts, "bind": patient}


def with_short_queue(texts: dict[str, str]) -> dict[str, str]:
    """A queue so short that requests come into the waiting room."""
    changed = {
        name: text.replace("local SHORT_QUEUE = 64\n", "local SHORT_QUEUE = 2\n") for name, text in texts.items()
    }
    assert "local SHORT_QUEUE = 2\n" in changed["submit"]
    assert not any("local SHORT_QUEUE = 64" in text for text in changed.values())
    return changed


def test_every_sequence_of_operations_does_what_the_model_says(redis_server, monkeypatch):
    texts = with_short_queue(patient_texts())
    monkeypatch.setattr(connection, "script_texts", lambda: texts)
    run_property(redis_server, NUM_EXAMPLES, (Phase.generate, Phase.shrink), short_queue=2)
