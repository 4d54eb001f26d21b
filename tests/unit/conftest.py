"""What all unit tests have in common."""

from __future__ import annotations

from hypothesis import settings

# No example is wrong for having been slow.
settings.register_profile("unhurried", settings(), deadline=None)
settings.load_profile("unhurried")
