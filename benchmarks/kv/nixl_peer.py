"""NIXL between two processes, its CPU lanes: shared memory by WRITE, cross-memory attach by READ, tcp by both.

Descriptors are made before the clock runs, and a slice is one request, as its users do it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.kv.peer_rounds import MIB, Numbers, measure, pattern

LANES = {
    "nixl posix,sysv WRITE": ("posix,sysv,self,tcp", "WRITE"),
    "nixl posix,cma READ": ("posix,cma,self,tcp", "READ"),
    "nixl tcp WRITE": ("tcp,self", "WRITE"),
    "nixl tcp READ": ("tcp,self", "READ"),
}


def start(name: str, memory: np.ndarray):  # type: ignore[no-untyped-def]
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(backends=[]))
    agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    return agent


def serve(pipe: Connection, size: int, fill: bool) -> None:
    memory = pattern(size).copy() if fill else np.zeros(size, np.uint8)
    agent = start("far", memory)
    pipe.send((agent.get_agent_metadata(), memory.ctypes.data))
    while True:
        command = pipe.recv()
        if command is None:
            os._exit(0)
        pipe.send([bytes(memory[a : a + n]) for a, n in command])


def run(lane: str, numbers: Numbers) -> None:
    os.environ["UCX_TLS"], operation = LANES[lane]
    size = numbers.pool_mib * MIB
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    is_read = operation == "READ"
    process = context.Process(target=serve, args=(far, size, is_read), daemon=True)
    process.start()
    memory = np.zeros(size, np.uint8) if is_read else pattern(size).copy()
    agent = start("near", memory)
    if not pipe.poll(60):
        raise TimeoutError("the far agent does not start")
    record, far_address = pipe.recv()
    peer = agent.add_remote_agent(record)
    agent.make_connection(peer)

    def move(src_at: np.ndarray, dst_at: np.ndarray, block: int) -> None:
        near_at, far_at = (dst_at, src_at) if is_read else (src_at, dst_at)
        sides = []
        for base, at in ((memory.ctypes.data, near_at), (far_address, far_at)):
            table = np.zeros((len(at), 3), np.uint64)
            table[:, 0], table[:, 1] = at + base, block
            sides.append(agent.get_xfer_descs(table, "DRAM"))
        handle = agent.initialize_xfer(operation, *sides, peer)
        state, until = agent.transfer(handle), time.monotonic() + 60
        while state == "PROC":
            state = agent.check_xfer_state(handle)
            if time.monotonic() > until:
                raise TimeoutError("a request does not end")
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"a request ended as {state}")

    # What memcpy reads and writes is memory of this process: of a far pool, a copy.
    if is_read:
        measure(lane, numbers, move, pattern(size), memory)
    else:
        measure(lane, numbers, move, memory, FarMemory(pipe, size))
    pipe.send(None)
    process.join(10)


class FarMemory(np.ndarray):
    """Memory here for memcpy to write; what is looked at is fetched from the far process."""

    def __new__(cls, pipe: Connection, size: int) -> FarMemory:
        made = np.zeros(size, np.uint8).view(cls)
        made.pipe = pipe
        return made

    def __getitem__(self, key: slice) -> np.ndarray:  # type: ignore[override]
        self.pipe.send([(int(key.start), int(key.stop - key.start))])
        return np.frombuffer(self.pipe.recv()[0], np.uint8)


def main() -> None:
    numbers = Numbers()
    context = multiprocessing.get_context("spawn")
    for lane in LANES:
        # A process a lane: UCX reads its environment once, and may crash when the interpreter ends.
        process = context.Process(target=run, args=(lane, numbers))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()


if __name__ == "__main__":
    import nixl._api  # noqa: F401 - without it there is nothing to measure

    main()
    os._exit(0)
