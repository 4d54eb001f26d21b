"""What the runner of the RDMA tests says about tests that a VM did not come to."""

from __future__ import annotations

from collections import Counter

from tests.rdma_vm.outcomes import Outcomes, summary

A, B, C, D = (f"tests/test_x.py::test_{name}" for name in ("a", "b[rdma-reserve first]", "c", "d"))


def outcomes_of(*lines: str) -> Outcomes:
    outcomes = Outcomes([A, B, C, D])
    for line in lines:
        outcomes.read(line)
    return outcomes


def test_what_a_vm_that_was_ended_did_not_come_to_is_not_run() -> None:
    outcomes = outcomes_of("collected 4 items", f"{A} PASSED     [ 25%]", f"{B} SKIPPED (no NIC [x]) [ 50%]", f"{C} ")
    assert outcomes.not_run == [C, D]
    assert summary(outcomes.counts()) == "1 passed, 0 failed, 1 skipped, 2 not run"


def test_a_test_that_fails_in_its_clean_up_has_failed() -> None:
    outcomes = outcomes_of(f"{A} PASSED [ 25%]", f"{A} ERROR [ 25%]", f"{B} FAILED [ 50%]", f"{B} PASSED [ 50%]")
    assert outcomes.counts() == Counter({"failed": 2, "not run": 2})


def test_lines_that_only_look_like_an_outcome_change_nothing() -> None:
    assert outcomes_of(f"{A} PASSED", f"FAILED {A} - assert", "tests/y.py::test_z PASSED [ 1%]").not_run == [A, B, C, D]
