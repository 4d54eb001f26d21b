"""The chaos harness notices a scheduler with a bug: each is planted in every process of a short run, and must show."""

from __future__ import annotations

import asyncio

import pytest

from tests.chaos.mutations import MUTATIONS
from tests.chaos.report import Result
from tests.chaos.run import run
from tests.chaos.spec import RunSpec, Shape

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
AT_A_TIME = 3
SHORT = RunSpec(
    duration_s=4.0, plan="none", rate=40.0, timeout_s=8.0, grace_s=4.0, ttl_s=1.0, step_s=0.02, shape=Shape(2, 2, 2, 1),
    settings={"instance_lease_s": 1.0, "frontend_lease_s": 1.5},
)  # fmt: skip


# Plans that several have in common need one control: the same plan without the bug.
CONTROLS = {mutation.plan: name for name, mutation in MUTATIONS.items()}


async def run_short(name: str, is_planted: bool) -> Result:
    spec = RunSpec(**{**vars(SHORT), "mutation": name if is_planted else None})
    return await run(spec, MUTATIONS[name].plan)


class Results:
    """Of runs that went beside each other; a test that is tried again has another run."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, bool], Result] = asyncio.run(self._make())

    async def _make(self) -> dict[tuple[str, bool], Result]:
        places = asyncio.Semaphore(AT_A_TIME)

        async def one(name: str, is_planted: bool) -> Result:
            async with places:
                return await run_short(name, is_planted)

        wanted = [*((name, True) for name in MUTATIONS), *((name, False) for name in CONTROLS.values())]
        return dict(zip(wanted, await asyncio.gather(*(one(*w) for w in wanted)), strict=True))

    def take(self, name: str, *, is_planted: bool) -> Result:
        made = self._made.pop((name, is_planted), None)
        return asyncio.run(run_short(name, is_planted)) if made is None else made


@pytest.fixture(scope="module")
def results() -> Results:
    return Results()


@pytest.mark.parametrize("name", MUTATIONS)
def test_bug_is_noticed(results, name):
    result = results.take(name, is_planted=True)
    assert getattr(result, MUTATIONS[name].shows_as), result.table()


@pytest.mark.parametrize("name", CONTROLS.values())
def test_nothing_is_noticed_without_a_bug(results, name):
    result = results.take(name, is_planted=False)
    assert not result.problems, result.table()
