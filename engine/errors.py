"""All errors of this package, beside those of the two that it builds on."""

from __future__ import annotations

from collections.abc import Sequence

from splitwise_sched.errors import ConfigError, SplitwiseError


class KVRejected(SplitwiseError):
    """KV that came for a request is not this request's, or is damaged: it has to be computed again.

    Attributes:
        key: of the run.
    """

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        super().__init__(f"the KV that came for {key} is refused: {reason}")


class MalformedHandover(SplitwiseError):
    """A hand-over that no prefill instance of this version writes, or one for another input."""


class UnknownEngine(ConfigError):
    """
    Attributes:
        installed: names of the engines that are registered here.
    """

    def __init__(self, name: str, installed: Sequence[str], remedy: str) -> None:
        self.name, self.installed = name, tuple(installed)
        super().__init__(f"--engine {name}: {remedy}; registered are: {', '.join(installed)}")
