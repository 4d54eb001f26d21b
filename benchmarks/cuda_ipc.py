"""How fast do scattered KV blocks move between two processes on one GPU, against a contiguous copy of the same bytes?

A prefill process holds a pool in GPU memory; this one maps it and copies random blocks into its own, by the parts of
``cuda_ipc`` itself. Device events time the copies; the blocks of every round are others, out of pools several times the
size of the L2 cache, and medians are compared. Beside them, in the same run: a contiguous device-to-device copy of as
many bytes, one ``memcpyPeerAsync`` a block, and torch's index_select and index_copy. Then what a transfer costs beside
its bytes, and how much a loop of matrix-vector products is slowed down by copies that run beside it.

Needs a CUDA device, cupy and torch; without, it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Report, at_least, at_most, parser, table
from kv_transfer import CudaOptions, KVLayout, Messenger, RankEndpoint, Received, Sent, TransferOptions
from kv_transfer.errors import TransportFailed
from kv_transfer.layout import placement_of
from kv_transfer.placement import packed
from kv_transfer.plan import plan_pair
from kv_transfer.transports.cuda_ipc.copies import StreamCopies
from kv_transfer.transports.cuda_ipc.geometry import families
from kv_transfer.transports.cuda_ipc.paths import Path as CopyPath
from kv_transfer.transports.cuda_ipc.paths import only
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from kv_transfer.transports.cuda_ipc.regions import IMPORTS, share
from kv_transfer.transports.cuda_ipc.runtime import Runtime, open_runtime

BLOCK_KIB = (4, 16, 32, 64)
LAYERS = 32
TIMEOUT_S = 60.0
BLOCKS_PER_MULTIPROCESSOR = (1, 2, 4, 8)


def layout(block_kib: int, pool_mib: int) -> KVLayout:
    """Layers and K and V apart, as most engines hold them: a block is a run of its own in each of 64 places."""
    run = block_kib * 1024
    num_blocks = pool_mib * 1024 // (block_kib * LAYERS * 2)
    shape = KVLayout("benchmark", "none", "bfloat16", LAYERS, 1, run // 2 // 16, 16, num_blocks)
    order = ("layer", "plane", "block", "token", "head")
    return KVLayout(**{**_fields(shape), "placement": packed(shape.shape, order)})


def _fields(shape: KVLayout) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__slots__}


def some_blocks(rng: np.random.Generator, num_blocks: int, count: int) -> list[np.ndarray]:
    """Random ids of a source and of a destination."""
    return [rng.permutation(num_blocks)[:count].astype(np.int64) for _ in range(2)]


def serve(pipe: Connection, block_kib: int, pool_mib: int) -> None:
    """The prefill process: holds a filled pool, and serves it by handle and by messenger until told to end."""
    import cupy

    shape = layout(block_kib, pool_mib)
    memory = cupy.empty(placement_of(shape).num_bytes, cupy.uint8)
    for start in range(0, memory.size, 1 << 27):
        piece = memory[start : start + (1 << 27)]
        piece[:] = cupy.random.randint(0, 256, piece.size, dtype=cupy.uint8)
    pool = CudaPool.of_tensors(shape, [memory])
    cupy.cuda.get_current_stream().synchronize()
    (region,) = share(pool.runtime, pool.regions)
    with Messenger(pool, TransferOptions(("cuda_ipc",), cuda=CudaOptions(path="kernel")), name="prefill") as messenger:
        pipe.send((region.handle, region.offset, messenger.endpoint.to_dict()))
        while (job := pipe.recv()) is not None:
            transfer_id, ids = job
            messenger.open_send(transfer_id, num_blocks=len(ids), deadline_s=TIMEOUT_S)
            messenger.send_blocks(transfer_id, 0, ids)
            messenger.finish_send(transfer_id, b"")
            pipe.send("offered")
            while not any(isinstance(event, Sent) for event in messenger.poll()):
                time.sleep(0.0001)
    pool.close()


class Bench:
    """Times work on a stream by device events."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.stream = runtime.create_stream(0)
        self._events = [runtime.create_event(0, timed=True) for _ in range(2)]

    def ms(self, work: Callable[[], None]) -> float:
        first, last = self._events
        self.runtime.record(0, first, self.stream)
        work()
        self.runtime.record(0, last, self.stream)
        self.wait(last)
        return self.runtime.elapsed_ms(first, last)

    def wait(self, event: int) -> None:
        until = time.monotonic() + TIMEOUT_S
        while not self.runtime.is_done(event):
            if time.monotonic() > until:
                raise TimeoutError("the device does not finish a copy")

    def median_ms(self, rounds: int, work: Callable[[int], None]) -> float:
        """Of ``rounds``, after one to warm up; each gets its number, for other blocks each time."""
        work_times = [self.ms(lambda n=number: work(n)) for number in range(rounds + 1)]
        return statistics.median(work_times[1:])


def measure(block_kib: int, args: argparse.Namespace, runtime: Runtime) -> list[dict[str, Any]]:
    """All rows of one block size."""
    import cupy
    import torch

    shape = layout(block_kib, args.pool_mib)
    context = multiprocessing.get_context("spawn")
    pipe, far_pipe = context.Pipe()
    process = context.Process(target=serve, args=(far_pipe, block_kib, args.pool_mib))
    process.start()
    bench = Bench(runtime)
    found: list[dict[str, Any]] = []
    try:
        memory = cupy.zeros(placement_of(shape).num_bytes, cupy.uint8)
        pool = CudaPool.of_tensors(shape, [memory])
        cupy.cuda.get_current_stream().synchronize()
        handle, offset, record = pipe.recv()
        source = IMPORTS.open(runtime, 0, handle) + offset
        plan = plan_pair(shape, shape)
        parts = families(plan.parts, plan, [source], pool.bases)
        rng = np.random.default_rng(0)
        count = args.move_mib * 1024 // (block_kib * LAYERS * 2)
        ids = [some_blocks(rng, shape.num_blocks, count) for _ in range(args.rounds + 1)]
        num_bytes = count * plan.unit_bytes

        def note(what: str, ms: float, **more: Any) -> None:
            rate = round(num_bytes / ms / 1e6, 2)
            found.append({"block_kib": block_kib, "what": what, "ms": round(ms, 4), "gb_s": rate, **more})

        other = cupy.zeros(num_bytes, cupy.uint8)
        starts = [int(rng.integers(0, (pool.layout.pool_bytes - num_bytes) // 256 + 1)) * 256 for _ in ids]

        def contiguous(number: int) -> None:
            runtime.copy_peer((0, other.data.ptr), (0, source + starts[number]), num_bytes, bench.stream)

        note("contiguous", bench.median_ms(args.rounds, contiguous))
        for per_multiprocessor in BLOCKS_PER_MULTIPROCESSOR:
            blocks = per_multiprocessor * runtime.num_multiprocessors(0)
            copies = StreamCopies(runtime, 0, bench.stream, blocks)

            def by_kernel(number: int, copies: StreamCopies = copies) -> None:
                copies.copy(parts, *ids[number], only(0, CopyPath.KERNEL))

            note("kernel", bench.median_ms(args.rounds, by_kernel), blocks_per_multiprocessor=per_multiprocessor)
            if per_multiprocessor == 4:
                check(memory, source, runtime, bench, (shape, ids[args.rounds]))
            copies.close()
        copies = StreamCopies(runtime, 0, bench.stream, 1)
        paths = [CopyPath.COPIES, *([CopyPath.BATCH] if runtime.has_batches else [])]
        # A call a block takes so long that a part of the blocks tells as much.
        some = max(1, count // 16)
        for path in paths:

            def by_calls(number: int, path: CopyPath = path) -> None:
                src_ids, dst_ids = ids[number]
                copies.copy(parts, src_ids[:some], dst_ids[:some], only(0, path))

            note(path.value, bench.median_ms(args.rounds, by_calls) * count / some, scaled_from_blocks=some)
        copies.close()
        found += by_torch(torch, memory, (shape, source, ids), (block_kib, num_bytes, args.rounds))
        if block_kib == BLOCK_KIB[0]:
            found += fixed_cost(bench, (shape, parts), (pipe, record, pool), args)
        if block_kib == 32:
            found += beside_decode(torch, runtime, (parts, ids), args)
        IMPORTS.close(runtime, 0, handle)
        pool.close()
        pipe.send(None)
        process.join(TIMEOUT_S)
    finally:
        if process.is_alive():
            process.kill()
    return found


def check(memory: Any, source: int, runtime: Runtime, bench: Bench, moved: tuple[KVLayout, list[np.ndarray]]) -> None:
    """That the last round's first and last blocks are there, to the byte."""
    import cupy

    shape, (src_ids, dst_ids) = moved
    run = shape.layer_block_bytes // 2
    mine = memory.reshape(LAYERS * 2, shape.num_blocks, run)
    theirs = cupy.empty(run, cupy.uint8)
    done = runtime.create_event(0)
    for place in (0, LAYERS * 2 - 1):
        for index in (0, len(src_ids) - 1):
            at = source + (place * shape.num_blocks + int(src_ids[index])) * run
            runtime.copy_peer((0, theirs.data.ptr), (0, at), run, bench.stream)
            runtime.record(0, done, bench.stream)
            bench.wait(done)
            if not bool((mine[place, int(dst_ids[index])] == theirs).all()):
                raise RuntimeError("blocks did not arrive as they were sent")
    runtime.destroy_event(done)


def by_torch(
    torch: Any, memory: Any, what: tuple[KVLayout, int, list[Any]], numbers: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """index_select into a temporary tensor, then index_copy_: what an engine does without a lane of its own."""
    import cupy

    (shape, source, ids), (block_kib, num_bytes, rounds) = what, numbers
    run = shape.layer_block_bytes // 2
    owned = cupy.cuda.UnownedMemory(source, memory.size, None, 0)
    theirs = cupy.ndarray((memory.size,), cupy.uint8, cupy.cuda.MemoryPointer(owned, 0))
    src, dst = (torch.from_dlpack(x).view(LAYERS * 2, shape.num_blocks, run) for x in (theirs, memory))
    times = []
    for src_ids, dst_ids in ids[: rounds + 1]:
        at, to = (torch.from_numpy(x).cuda() for x in (src_ids, dst_ids))
        first, last = (torch.cuda.Event(enable_timing=True) for _ in "se")
        torch.cuda.current_stream().synchronize()
        first.record()
        dst.index_copy_(1, to, src.index_select(1, at))
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    ms = statistics.median(times[1:])
    return [{"block_kib": block_kib, "what": "torch", "ms": round(ms, 4), "gb_s": round(num_bytes / ms / 1e6, 2)}]


def fixed_cost(
    bench: Bench, what: tuple[KVLayout, Any], peer: tuple[Connection, Any, CudaPool], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """64 blocks: on the device, between events around all that a fetch enqueues; and through both messengers."""
    (shape, parts), (pipe, record, pool) = what, peer
    copies = StreamCopies(bench.runtime, 0, bench.stream, 4 * bench.runtime.num_multiprocessors(0))
    rng = np.random.default_rng(1)
    ids = [some_blocks(rng, shape.num_blocks, 64) for _ in range(args.rounds * 10)]
    kernel = only(0, CopyPath.KERNEL)
    host_us = []

    def one(number: int) -> None:
        began = time.perf_counter()
        copies.copy(parts, *ids[number], kernel)
        host_us.append((time.perf_counter() - began) * 1e6)

    device_us = bench.median_ms(len(ids) - 1, one) * 1e3
    copies.close()
    news = threading.Event()
    options = TransferOptions(("cuda_ipc",), cuda=CudaOptions(path="kernel"))
    whole_us = []
    with Messenger(pool, options, name="decode", on_event=news.set) as messenger:
        endpoint = RankEndpoint.from_dict(record)
        for number, (src_ids, dst_ids) in enumerate(ids):
            pipe.send((f"t{number}", src_ids))
            assert pipe.recv() == "offered"
            began = time.perf_counter()
            messenger.open_receive(f"t{number}", [endpoint], dst_ids, deadline_s=TIMEOUT_S)
            while not (events := messenger.poll()):
                news.wait(1.0)
                news.clear()
            if not isinstance(events[0], Received):
                raise RuntimeError(f"a transfer failed: {events[0].reason}")
            whole_us.append((time.perf_counter() - began) * 1e6)
    size = 64 * LAYERS * 2 * 4096
    enqueue_us = round(statistics.median(host_us), 2)
    return [
        {"what": "fixed", "bytes": size, "device_us": round(device_us, 2), "enqueue_us": enqueue_us},
        {"what": "transfer", "bytes": size, "us": round(statistics.median(whole_us[1:]), 1)},
    ]


def beside_decode(
    torch: Any, runtime: Runtime, what: tuple[Any, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A loop as memory-bound as decoding, alone and beside copies with more and fewer thread blocks."""
    parts, ids = what
    weights = torch.randn(8, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    vector = torch.randn(8192, 16, dtype=torch.bfloat16, device="cuda")

    def step_ms() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in "se")
        first.record()
        for weight in weights:
            weight @ vector
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    step_ms()
    alone = statistics.median(step_ms() for _ in range(args.rounds * 5))
    found = [{"what": "decode alone", "step_ms": round(alone, 4)}]
    for per_multiprocessor in (0.125, 0.5, *BLOCKS_PER_MULTIPROCESSOR):
        blocks = max(1, int(per_multiprocessor * runtime.num_multiprocessors(0)))
        stream = runtime.create_stream(0)
        copies = StreamCopies(runtime, 0, stream, blocks)
        ending, copied = threading.Event(), [0]

        def keep_copying(
            ending: threading.Event = ending, copies: StreamCopies = copies, copied: list[int] = copied
        ) -> None:
            done = runtime.create_event(0)
            while not ending.is_set():
                src_ids, dst_ids = ids[copied[0] % len(ids)]
                copies.copy(parts, src_ids, dst_ids, only(0, CopyPath.KERNEL))
                runtime.record(0, done, copies.stream)
                while not runtime.is_done(done):
                    time.sleep(0.00002)
                copied[0] += 1
            runtime.destroy_event(done)

        thread = threading.Thread(target=keep_copying)
        thread.start()
        began = time.perf_counter()
        beside = statistics.median(step_ms() for _ in range(args.rounds * 5))
        seconds = time.perf_counter() - began
        ending.set()
        thread.join(TIMEOUT_S)
        copies.close()
        runtime.destroy_stream(stream)
        rate = copied[0] * len(ids[0][0]) * sum(family.unit_bytes for family in parts) / seconds / 1e9
        row = {"what": "decode beside copies", "thread_blocks": blocks, "step_ms": round(beside, 4)}
        found.append({**row, "slow_down": round(beside / alone, 3), "copies_gb_s": round(rate, 1)})
    return found


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--pool-mib", type=int, default=8192)
    flags.add_argument("--move-mib", type=int, default=2048, help="moved in one round")
    flags.add_argument("--rounds", type=int, default=15)
    args = flags.parse_args()
    if args.quick:
        args.pool_mib, args.move_mib, args.rounds = 2048, 512, 5
    report = Report("cuda_ipc", {k: v for k, v in vars(args).items() if k != "json"})
    try:
        runtime = open_runtime()
        import torch

        if not torch.cuda.is_available():
            raise TransportFailed("torch sees no CUDA device")
    except (TransportFailed, ImportError) as exc:
        print(f"no CUDA device, nothing measured: {exc}")
        report.finish(args.json)
        return
    report.settings = {**report.settings, "gpu": runtime.describe(0)}
    for block_kib in BLOCK_KIB:
        report.runs += measure(block_kib, args, runtime)
    summarize(report)
    report.finish(args.json)


def summarize(report: Report) -> None:
    """The table, and the targets."""
    rows = []
    for block_kib in BLOCK_KIB:
        rates = {r["what"]: r["gb_s"] for r in report.runs if r.get("block_kib") == block_kib and r["what"] != "kernel"}
        kernels = [r for r in report.runs if r.get("block_kib") == block_kib and r["what"] == "kernel"]
        ours = next(r["gb_s"] for r in kernels if r["blocks_per_multiprocessor"] == 4)
        ratio = ours / rates["contiguous"]
        rows.append((f"{block_kib} KiB", rates["contiguous"], ours, f"{ratio:.2f}", rates["copies"],
                     rates.get("batch", "-"), rates["torch"]))  # fmt: skip
        report.targets.append(at_least(f"of a contiguous copy, {block_kib} KiB", ratio, 0.7 if block_kib < 16 else 0.9))
        if block_kib == 16:
            for other in ("copies", "torch"):
                report.targets.append(at_least(f"times {other}, 16 KiB", ours / rates[other], 5.0))
    print(table(("GB/s", "contiguous", "kernel", "ratio", "a call a block", "batch", "torch"), rows))
    fixed = next(r for r in report.runs if r["what"] == "fixed")
    best = max(r["gb_s"] for r in report.runs if r["what"] == "contiguous")
    own_us = fixed["device_us"] - fixed["bytes"] / best / 1e3
    report.targets.append(at_most("us beside the bytes, 64 blocks x 32 layers x K/V of 4 KiB", own_us, 30.0))
    for run in report.runs:
        if run["what"] in ("fixed", "transfer") or run["what"].startswith("decode"):
            print({key: value for key, value in run.items() if key != "block_kib"})


if __name__ == "__main__":
    main()
