"""Fixtures of several suites here."""

from tests.integration.kv_pairs import ranks  # noqa: F401
from tests.simulated_verbs import fabric  # noqa: F401
