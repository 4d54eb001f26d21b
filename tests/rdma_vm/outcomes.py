"""What became of tests, from the lines that ``pytest -v`` prints; what was not run too, as a VM may end before them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_LINE = re.compile(r"(?P<test>\S.*?::.+) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: \(.*\))? +\[ *\d+%\]")
_NAMES = {"PASSED": "passed", "XPASS": "passed", "XFAIL": "passed", "SKIPPED": "skipped"}
_NOT_RUN = "not run"


class Outcomes:
    """Of the tests of one share, in their order."""

    def __init__(self, tests: Iterable[str]) -> None:
        """
        Args:
            tests: node ids, as they were collected.
        """
        self._outcomes = dict.fromkeys(tests, _NOT_RUN)

    def read(self, line: str) -> None:
        """A line of output; one that tells no outcome changes nothing."""
        found = _LINE.fullmatch(line.strip())
        if found is None or found["test"] not in self._outcomes:
            return
        # A test that passes, and cannot be cleaned up after, has two lines.
        if self._outcomes[found["test"]] != "failed":
            self._outcomes[found["test"]] = _NAMES.get(found["outcome"], "failed")

    @property
    def not_run(self) -> list[str]:
        """Begun or not, they did not come to their end."""
        return [test for test, outcome in self._outcomes.items() if outcome == _NOT_RUN]

    def counts(self) -> Counter[str]:
        return Counter(self._outcomes.values())


def summary(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped", _NOT_RUN))
