"""What becomes of vLLM's processes when the one that started them is killed."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import psutil
import pytest

from engine.demo.fleet import Fleet
from tests.vllm.survivors import survivors
from tests.vllm.test_instances import READY_S, start_instance

# vLLM's engine, two workers, and multiprocessing's resource tracker.
NUM_BELOW = 4


@pytest.mark.parametrize("moment", ["loads", "serves"])
async def test_nothing_of_an_instance_outlives_its_main_process(model: Path, moment: str) -> None:
    with Fleet() as fleet:
        main = psutil.Process(start_instance(fleet, "mixed", 0, model, "--tensor-parallel-size", "2").process.pid)
        if moment == "serves":
            await fleet.wait_for_instances(1, READY_S)
        else:
            deadline = time.monotonic() + READY_S
            while len(main.children(recursive=True)) < NUM_BELOW and time.monotonic() < deadline:
                fleet.check()
                await asyncio.sleep(0.05)
        below = main.children(recursive=True)
        assert len(below) >= NUM_BELOW, below
        fleet.kill("mixed-0")
        fleet.members.clear()
        assert not await asyncio.to_thread(survivors, below)
