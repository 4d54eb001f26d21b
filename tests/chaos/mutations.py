"""Bugs to plant in the processes of a run, and the shortest plan that brings each to light.

Each stands for a rule that keeps requests safe; a harness that stays green without it would not be worth much.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from splitwise_sched import connection
from splitwise_sched.assembly import Assembly
from splitwise_sched.instance import InstanceSession
from splitwise_sched.recovery import Recovery
from splitwise_sched.store import Lapsed, Store
from splitwise_sched.types import Output
from tests.chaos.plan import Event


def _in_script(script: str, right: str, wrong: str) -> Callable[[], None]:
    """``script``: "common" for what is shared, in all that use it."""

    def plant_it() -> None:
        real_texts = connection.script_texts

        def faulty() -> dict[str, str]:
            texts = real_texts()
            chosen = [name for name, text in texts.items() if right in text] if script == "common" else [script]
            assert chosen and all(texts[name].count(right) == 1 for name in chosen), (
                f"{script} no longer has {right!r} once"
            )
            return {**texts, **{name: texts[name].replace(right, wrong) for name in chosen}}

        connection.script_texts = faulty

    return plant_it


def _in_class(owner: type, name: str, instead: Any) -> Callable[[], None]:
    assert hasattr(owner, name), f"{owner.__name__} has no {name} any more"
    return lambda: setattr(owner, name, instead)


def _any_epoch_is_good(self: Assembly, epoch: int) -> bool:
    self.epoch = max(self.epoch, epoch)
    return not self.ended


def _repeats_go_through(self: Assembly, output: Output) -> list[Output]:
    if self.ended or (output.epoch != self.epoch and not self.raise_epoch(output.epoch)):
        return []
    self.token_ids += output.token_ids
    self.ended = output.finish_reason is not None
    return [output]


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


async def _nobody(self: Store) -> Lapsed:
    return Lapsed([], [], False)


async def _no_orphan(*args: Any) -> tuple[int, str]:
    return 0, "0"


async def _never(self: Recovery, *args: Any) -> None:
    await asyncio.Event().wait()


@dataclass(frozen=True)
class Mutation:
    """A bug.

    Attributes:
        plan: faults under which it shows; without any, load alone does.
        shows_as: what the run has to report: lost, wrong or leaked.
        in_script: it changes the text of a script, which has to have that text.
    """

    plant: Callable[[], None]
    shows_as: str
    plan: tuple[Event, ...] = ()
    in_script: bool = False


_KILL = (Event(0.8, "kill decode", 0.0, 0.1),)
_ZOMBIE = (Event(0.8, "zombie decode", 0.0, 0.1),)

MUTATIONS: dict[str, Mutation] = {
    "the front end takes outputs of any epoch": Mutation(
        _in_class(Assembly, "raise_epoch", _any_epoch_is_good), "wrong", _ZOMBIE
    ),
    "the front end gives repeated outputs to its user": Mutation(
        _in_class(Assembly, "feed", _repeats_go_through), "wrong"
    ),
    "queue entries are deleted and not acknowledged": Mutation(
        _in_script("common", "  redis.pcall('XACK', queue, 'prefill', r.queue_entry)\n", ""), "leaked", in_script=True
    ),
    "a reservation outlives its request": Mutation(
        _in_script("common", "    reserve(r.decode, -number(r.kv_reserved), -1)\n", ""), "leaked", in_script=True
    ),
    "an instance goes on without its lease": Mutation(_in_class(InstanceSession, "_lose", _nothing), "leaked", _ZOMBIE),
    "the front end puts nothing back": Mutation(_in_class(Recovery, "recover", _nothing), "lost", _KILL),
    "nobody reaps dead instances": Mutation(_in_class(Store, "lapsed", _nobody), "lost", _KILL),
    "the front end never asks Redis about its requests": Mutation(
        _in_class(Recovery, "verify", _never), "lost", (Event(0.8, "flushall", 0.0, 0.0),)
    ),
    "nobody cancels what a dead front end wanted": Mutation(
        _in_class(Store, "cancel_orphans", _no_orphan), "leaked", (*_KILL, Event(0.9, "kill frontend", 0.0, 0.1))
    ),
}


def plant(name: str) -> None:
    MUTATIONS[name].plant()
