"""Which shard an instance goes to, as a table; and which one a request."""

from __future__ import annotations

import random

import pytest

from splitwise_sched.placement import choose_shard, has_company, no_shard_left, open_to
from splitwise_sched.records import InstanceRecord, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.shards import Shards
from splitwise_sched.types import Role


def records(roles: str) -> list[InstanceRecord] | None:
    """ "p", "d" and "m" stand for instances; "x" for a shard that does not answer."""
    kinds = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
    if roles == "x":
        return None
    return [InstanceRecord(f"{c}{i}", kinds[c], "toy", 1, 1, 0, {}) for i, c in enumerate(roles)]


@pytest.mark.parametrize(
    ("role", "shards", "chosen"),
    [
        # It completes a shard.
        (Role.PREFILL, ("pd", "d", ""), 1),
        (Role.DECODE, ("pd", "", "ppp"), 2),
        (Role.MIXED, ("pd", "", "p"), 2),
        # Of several that lack it, any; the fewest of its kind count where none lacks it.
        (Role.PREFILL, ("ppd", "pd", "ppd"), 1),
        (Role.DECODE, ("pd", "pd", "pdd", "x"), None),
        # Nobody is there: whoever comes next completes it.
        (Role.PREFILL, ("pd", ""), 1),
        (Role.DECODE, ("pd", "d", ""), 2),
        # A whole one, rather than the third of a kind where there is nobody else.
        (Role.PREFILL, ("pp", "ppppd"), 1),
        # All the same, to the smallest.
        (Role.PREFILL, ("pp", "p"), 1),
        (Role.MIXED, ("mm", "m", "x"), 1),
    ],
)
def test_instance_goes_where_it_is_needed(role, shards, chosen):
    found = choose_shard("name", role, [records(s) for s in shards])
    if chosen is None:
        assert found in (0, 1)
    else:
        assert found == chosen


@pytest.mark.parametrize(
    ("role", "shards", "chosen"),
    [
        (Role.PREFILL, ("", "pd"), 1),
        (Role.PREFILL, ("p", "", "d"), 2),
        (Role.PREFILL, ("p", ""), None),
        (Role.DECODE, ("d", "x"), None),
    ],
)
def test_instance_that_was_alone_goes_only_to_where_it_is_not(role, shards, chosen):
    assert choose_shard("name", role, [records(s) for s in shards], wants_company=True) == chosen


def test_among_equals_the_name_decides_and_the_same_name_always_goes_to_the_same_shard():
    empty = [records("")] * 8
    chosen = {name: choose_shard(name, Role.PREFILL, empty) for name in map(str, range(400))}
    assert chosen == {name: choose_shard(name, Role.PREFILL, empty) for name in chosen}
    sizes = [list(chosen.values()).count(shard) for shard in range(8)]
    assert min(sizes) > 20
    # One shard fewer moves only those that were there.
    fewer = {name: choose_shard(name, Role.PREFILL, empty[:7]) for name in chosen}
    assert all(fewer[name] == shard for name, shard in chosen.items() if shard != 7)


@pytest.mark.parametrize(
    ("role", "others", "is_so"),
    [
        (Role.PREFILL, "pp", False),
        (Role.PREFILL, "pd", True),
        (Role.DECODE, "d", False),
        (Role.DECODE, "m", True),
        (Role.MIXED, "", True),
    ],
)
def test_company_is_who_can_be_the_other_half_of_a_pair(role, others, is_so):
    assert has_company(role, records(others)) is is_so


def shards_with(*depths: int | None) -> Shards:
    """Shards of one prefill instance each, with so many requests waiting; None: nobody serves it."""
    shards = Shards(SchedulerSettings(scheduler_host="nowhere", scheduler_shards=len(depths)))
    for shard, depth in zip(shards, depths, strict=True):
        shard.model = "toy"
        if depth is not None:
            shard.unserved_since, shard.depth = None, depth
    return shards


async def test_requests_go_to_shards_that_serve_and_to_those_with_little_to_do_first(monkeypatch):
    random.seed(4)
    shards = shards_with(0, 100, None, 0)
    chosen = [(await shards.choose("toy", ())).index for _ in range(300)]
    assert 2 not in chosen
    assert chosen[:50].count(1) == 0
    # What is sent counts at once, without another look.
    assert abs(shards[0].depth - shards[3].depth) <= 30
    assert abs(shards[0].depth - shards[1].depth) <= 40


async def test_without_any_that_serves_a_request_goes_to_the_one_that_was_served_last():
    shards = shards_with(None, None, None)
    for shard, since in zip(shards, (5.0, 9.0, 7.0), strict=True):
        shard.unserved_since = since
    assert (await shards.choose("toy", ())).index == 1


def test_a_request_stays_where_it_is_until_nobody_has_come_back_for_a_while():
    shards = shards_with(0, 0)
    assert shards.refuge(shards[0], "toy") is None
    shards[0].unserved_since = float("-inf")
    assert shards.refuge(shards[0], "toy") is shards[1]
    shards[1].unserved_since = 0.0
    assert shards.refuge(shards[0], "toy") is None


def test_a_request_leaves_a_shard_that_has_another_model_at_once():
    shards = shards_with(0, 0, None, None)
    shards[0].model = "other"
    assert shards.refuge(shards[0], "toy") is shards[1]
    assert shards.refuge(shards[1], "toy") is None
    # Its own model is away everywhere: to where it was last.
    shards[1].unserved_since, shards[2].unserved_since, shards[3].unserved_since = 5.0, 9.0, 7.0
    assert shards.refuge(shards[0], "toy") is shards[2]
    assert shards.refuge(shards[0], "third") is None


async def test_requests_go_to_shards_of_their_model_alone():
    shards = shards_with(0, 0, 0)
    shards[2].model = "other"
    assert {(await shards.choose("toy", ())).index for _ in range(50)} == {0, 1}
    assert (await shards.choose("other", ())).index == 2
    # One without instances keeps what it had.
    shards[2].unserved_since = 1.0
    assert (await shards.choose("other", ())).index == 2


@pytest.mark.parametrize(
    ("kind", "open_ones"),
    [
        ({"model": "toy", "kv.dtype": "int8"}, [True, True, False, False]),
        ({"model": "toy", "kv.dtype": "bf16"}, [False, True, True, False]),
        ({"model": "new", "kv.dtype": "bf16"}, [False, True, False, False]),
    ],
)
def test_shards_of_another_kind_are_closed_to_an_instance(kind, open_ones):
    def record(**fields: str) -> list[InstanceRecord]:
        return [InstanceRecord("i", Role.MIXED, fields["model"], 1, 1, 0, fields)]

    census = [
        record(model="toy", **{"kv.dtype": "int8"}),
        [],
        record(model="toy", **{"kv.dtype": "bf16"}),
        None,
    ]
    model = kind.pop("model")
    registration = Registration("n", Role.MIXED, model, kind, 1, 1, 1, 1)
    assert [records is not None for records in open_to(registration, census)] == open_ones
    refusal = no_shard_left(registration, "t", census)
    assert "shard 0: 'toy', " in str(refusal) and "--scheduler-shards" in str(refusal)
