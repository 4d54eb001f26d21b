"""Whether processes that nobody killed grow: memory, file descriptors, tasks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tests.chaos.fleet import Member, Sample

MIN_TREND_S = 120.0  # less says nothing about memory
MAX_RSS_GROWTH_BYTES, MAX_RSS_GROWTH_PART = 8 << 20, 0.10
MAX_MORE_FDS, MAX_MORE_TASKS = 4, 3


def leaks_of(member: Member, idle: Sample) -> list[str]:
    """Args:
    idle: how it was before there was load; the last sample is of when all load had gone.
    """
    if not member.samples:
        return [f"{member.name} gave no sample"]
    last = member.samples[-1]
    problems = []
    if last.num_fds > idle.num_fds + MAX_MORE_FDS:
        problems.append(f"{member.name} has {last.num_fds} file descriptors open, at its start {idle.num_fds}")
    if last.num_tasks > idle.num_tasks + MAX_MORE_TASKS:
        problems.append(f"{member.name} has {last.num_tasks} tasks, at its start {idle.num_tasks}")
    growth = rss_growth_bytes(member.samples)
    if growth is not None and growth[1] > max(MAX_RSS_GROWTH_BYTES, MAX_RSS_GROWTH_PART * growth[0]):
        problems.append(f"{member.name} grew from {growth[0] >> 20} MiB by {growth[1] >> 20} MiB under even load")
    return problems


def rss_growth_bytes(samples: Sequence[Sample]) -> tuple[int, int] | None:
    """(memory about the middle of the run, growth from there to its end); None when the run was too short to tell."""
    if len(samples) < 20 or samples[-1].at - samples[0].at < MIN_TREND_S:
        return None
    tenth = len(samples) // 10
    middle = int(median(s.rss_bytes for s in samples[4 * tenth : 5 * tenth]))
    end = int(median(s.rss_bytes for s in samples[-tenth:]))
    return middle, end - middle
