"""Scattered memory through a socket that takes and gives it in pieces of any size."""

from __future__ import annotations

import random
import socket

import numpy as np
import pytest

from kv_transfer.transports.tcp_buffers import MAX_IOVECS, Buffers, whole


def scattered(rng: random.Random, total: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Memory, and stretches of it, in random order, that add up to ``total`` bytes."""
    memory = np.frombuffer(rng.randbytes(2 * total), np.uint8).copy()
    stretches, at, left = [], 0, total
    while left:
        size = min(left, rng.choice([1, 3, 64, 1000, 9000]))
        stretches.append((at, size))
        at, left = at + size + rng.choice([0, 1, 17]) if at + size + 17 + left < 2 * total else at + size, left - size
    rng.shuffle(stretches)
    return memory, np.array([[memory.ctypes.data + a, n] for a, n in stretches], np.uint64), stretches


@pytest.mark.parametrize("seed", range(5))
def test_bytes_come_out_of_scattered_memory_and_into_other_scattered_memory_in_order(seed: int) -> None:
    rng = random.Random(seed)
    total = rng.choice([1, 5000, 3_000_000])
    source, src_iovecs, src_stretches = scattered(rng, total)
    target, dst_iovecs, dst_stretches = scattered(rng, total)
    before = target.copy()
    near, far = socket.socketpair()
    with near, far:
        sending, receiving = Buffers(src_iovecs, source), Buffers(dst_iovecs, target)
        sent = received = 0
        while received < total:
            try:
                sent += sending.send(near) if sent < total else 0
            except BlockingIOError:
                pass
            try:
                received += receiving.receive(far)
            except BlockingIOError:
                pass
    wanted = np.concatenate([source[a : a + n] for a, n in src_stretches])
    got = np.concatenate([target[a : a + n] for a, n in dst_stretches])
    assert np.array_equal(got, wanted)
    for a, n in dst_stretches:
        before[a : a + n] = target[a : a + n]
    assert np.array_equal(before, target), "nothing beside the stretches was written"


def test_more_stretches_than_one_call_takes_are_sent_all_the_same() -> None:
    memory = np.arange(3 * MAX_IOVECS, dtype=np.uint32).view(np.uint8)
    iovecs = np.array([[memory.ctypes.data + 4 * i, 4] for i in range(3 * MAX_IOVECS)], np.uint64)
    near, far = socket.socketpair()
    with near, far:
        sending, sent = Buffers(iovecs, memory), 0
        while sent < memory.nbytes:
            sent += sending.send(near)
        out = np.empty_like(memory)
        receiving, received = Buffers(whole(out), out), 0
        while received < memory.nbytes:
            received += receiving.receive(far)
    assert np.array_equal(out, memory)


def test_a_connection_that_is_closed_is_an_error_for_the_sender_and_an_end_for_the_receiver() -> None:
    memory = np.zeros(100, np.uint8)
    near, far = socket.socketpair()
    near.close()
    with far:
        assert Buffers(whole(memory), memory).receive(far) == 0
        with pytest.raises(BrokenPipeError):
            Buffers(whole(memory), memory).send(far)
