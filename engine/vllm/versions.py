"""Which vLLM this connector is written for."""

from __future__ import annotations

from splitwise_sched.errors import ConfigError

TESTED = "0.32"
SUPPORTED = ("0.32",)


def check_version(version: str) -> None:
    """
    Raises:
        ConfigError: vLLM's connector interface changes between minor versions, and this one was never tried.
    """
    minor = ".".join(version.split(".")[:2])
    if minor not in SUPPORTED:
        raise ConfigError(
            f"vLLM {version} is installed; this connector supports {', '.join(f'{v}.x' for v in SUPPORTED)}: install "
            f"vllm=={TESTED}.0, or use a version of splitwise-sched that supports yours"
        )
