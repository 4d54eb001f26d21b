"""A loop in a thread: what it raises before it is ready, what waits too long, what ends."""

from __future__ import annotations

import asyncio
import threading

import pytest

from splitwise_sched.errors import ConfigError, StoreUnavailable
from splitwise_sched.loop_thread import LoopThread


def threads(name: str) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == name]


def test_main_runs_from_start_to_close():
    ended = []

    async def main(ready, stop) -> None:
        ready()
        await stop.wait()
        ended.append(True)

    thread = LoopThread("from-start-to-close", main)
    thread.start(10)
    assert thread.loop is not None and not ended
    thread.close(10)
    thread.close(10)
    assert ended and thread.loop is None and not threads("from-start-to-close")


def test_what_main_raises_before_it_is_ready_is_raised_by_start():
    async def main(ready, stop) -> None:
        raise ConfigError("wrong")

    with pytest.raises(ConfigError, match="wrong"):
        LoopThread("raises", main).start(10)
    assert not threads("raises")


def test_main_that_is_never_ready_is_cancelled():
    cleaned = []

    async def main(ready, stop) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    with pytest.raises(StoreUnavailable, match=r"within 0\.2 s"):
        LoopThread("never-ready", main).start(0.2)
    assert cleaned and not threads("never-ready")
