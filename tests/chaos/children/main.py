"""Where every process of a run begins: ``begin`` in a fork of the zygote, or ``python -m`` for its own clock."""

from __future__ import annotations

import asyncio
import gc
import glob
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop

from splitwise_sched.settings import SchedulerSettings
from tests.chaos import mutations
from tests.chaos.channel import Channel
from tests.chaos.children import frontend, instance, link, sweeper
from tests.chaos.spec import INSTANCE_ROLES, ChildSpec

ROOT = Path(__file__).resolve().parents[3]
FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"


def faketime_library() -> str | None:
    return next(iter(sorted(glob.glob(FAKETIME))), None)


def begin(text: str) -> None:
    """Does not return to whoever forked this process."""
    spec = ChildSpec.from_json(text)
    if spec.clock_offset_s and "FAKETIME" not in os.environ:
        library = faketime_library()
        assert library is not None, "whoever asks for another clock has looked whether there is libfaketime"
        own = {"LD_PRELOAD": library, "FAKETIME": f"{spec.clock_offset_s:+d}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-m", "tests.chaos.children.main", text], {**os.environ, **own})
    log = os.open(spec.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s.%(msecs)03d {spec.generation} %(message)s",
                        datefmt="%H:%M:%S", force=True)  # fmt: skip
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if spec.mutation is not None:
        mutations.plant(spec.mutation)
    uvloop.run(_run(spec))


def _dump_tasks() -> None:
    """Into the log: where every task stands, and what those died of that nobody has waited for."""
    for task in (o for o in gc.get_objects() if isinstance(o, asyncio.Task)):
        if not task.done() or (not task.cancelled() and task.exception() is not None):
            task.print_stack(file=sys.stderr)
    sys.stderr.flush()


async def _run(spec: ChildSpec) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _dump_tasks)
    commands: asyncio.Queue[list] = asyncio.Queue()
    channel = await Channel.open(spec.hub, spec.name, commands.put_nowait)
    if spec.role == "link":
        await link.run(channel, commands, spec.settings["targets"])
        return
    settings = SchedulerSettings(**spec.settings)
    if spec.role == "frontend":
        await frontend.run(spec, settings, channel, commands)
    elif spec.role == "sweeper":
        await sweeper.run(settings, channel, commands)
    else:
        assert spec.role in INSTANCE_ROLES, spec.role
        await instance.run(spec, settings, channel, commands)


if __name__ == "__main__":
    begin(sys.argv[1])
