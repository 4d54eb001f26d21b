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


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, bool], Result]:
    """By mutation, and whether it was planted: the same plan without it is the control."""

    async def run_all() -> dict[tuple[str, bool], Result]:
        places = asyncio.Semaphore(AT_A_TIME)

        async def one(name: str, is_planted: bool) -> Result:
            async with places:
                spec = RunSpec(**{**vars(SHORT), "mutation": name if is_planted else None})
                return await run(spec, MUTATIONS[name].plan)

        # Plans that several have in common need one control.
        controls = {mutation.plan: name for name, mutation in MUTATIONS.items()}
        wanted = [*((name, True) for name in MUTATIONS), *((name, False) for name in controls.values())]
        return dict(zip(wanted, await asyncio.gather(*(one(*w) for w in wanted)), strict=True))

    return asyncio.run(run_all())


@pytest.mark.parametrize("name", MUTATIONS)
def test_bug_is_noticed(results, name):
    result = results[name, True]
    assert getattr(result, MUTATIONS[name].shows_as), result.table()


def test_nothing_is_noticed_without_a_bug(results):
    for (_, is_planted), result in results.items():
        if not is_planted:
            assert not result.problems, result.table()
