"""The seam to CUDA does on a device what its twin does in the other tests."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kv_transfer import Messenger, PoolNotServed, PoolUnavailable, TransferOptions
from kv_transfer.layout import KVLayout
from kv_transfer.plan import plan_pair
from kv_transfer.transports.cuda_ipc.copies import StreamCopies
from kv_transfer.transports.cuda_ipc.geometry import families
from kv_transfer.transports.cuda_ipc.paths import Path, only
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from kv_transfer.transports.cuda_ipc.regions import region_of, share
from kv_transfer.transports.cuda_ipc.runtime import open_runtime
from tests.integration.kv_memory import DeviceArray
from tests.integration.kv_rank import LAYOUT, pattern

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("path", list(Path), ids=lambda path: path.value)
@pytest.mark.parametrize("head_dim", [64, 4, 2, 1], ids=["16-byte words", "8", "4 or more", "2 or more"])
def test_every_path_copies_every_width_of_words(path: Path, head_dim: int) -> None:
    runtime = open_runtime()
    if path is Path.BATCH and not runtime.has_batches:
        pytest.skip("cuda-bindings has no cudaMemcpyBatchAsync here")
    src = KVLayout("e", "m", "uint8", 3, 3, head_dim, 4, 64)
    dst = KVLayout("e", "m", "uint8", 3, 3, head_dim, 4, 50, packing="layer-major")
    one, other = CudaPool.allocate(src), CudaPool.allocate(dst)
    memory = [DeviceArray(runtime, 0, (p.bases[0], p.regions[0].num_bytes)) for p in (one, other)]
    rng = np.random.default_rng(0)
    for array in memory:
        array[:] = rng.integers(0, 256, len(array), dtype=np.uint8)
    stream = runtime.create_stream(0)
    copies = StreamCopies(runtime, 0, stream, 8)
    plan = plan_pair(src, dst)
    src_ids, dst_ids = (rng.permutation(n)[:30].astype(np.int64) for n in (64, 50))
    wanted = np.asarray(memory[1]).reshape(3, 2, 50, -1)
    wanted[:, :, dst_ids] = np.asarray(memory[0]).reshape(64, 3, 2, -1)[src_ids].transpose(1, 2, 0, 3)
    copies.copy(families(plan.parts, plan, one.bases, other.bases), src_ids, dst_ids, only(0, path))
    done = runtime.create_event(0)
    runtime.record(0, done, stream)
    until = time.monotonic() + 30
    while not runtime.is_done(done):
        assert time.monotonic() < until
    assert np.array_equal(np.asarray(memory[1]).reshape(3, 2, 50, -1), wanted)
    runtime.destroy_event(done)
    copies.close()
    runtime.destroy_stream(stream)
    one.close()
    other.close()


def test_a_torch_tensor_in_the_middle_of_an_allocation_is_exported_with_its_offset() -> None:
    torch = pytest.importorskip("torch")
    big = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    (shared,) = share(open_runtime(), [region_of(big[4096 : 4096 + 65536])])
    (whole,) = share(open_runtime(), [region_of(big)])
    assert shared.offset - whole.offset == 4096
    assert shared.handle == whole.handle


def test_tensors_that_cannot_be_a_pool_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(PoolUnavailable, match="host memory"):
        region_of(torch.zeros(8))
    with pytest.raises(PoolUnavailable, match="not contiguous"):
        region_of(torch.zeros(8, 8, device="cuda").t())


def test_expandable_segments_are_refused_with_the_setting_to_change() -> None:
    torch = pytest.importorskip("torch")
    settings = getattr(torch.cuda.memory, "_set_allocator_settings", None)
    if settings is None:
        pytest.skip("this torch cannot switch its allocator while it runs")
    torch.cuda.empty_cache()
    settings("expandable_segments:True")
    try:
        tensor = torch.zeros(LAYOUT.pool_bytes, dtype=torch.uint8, device="cuda")
        with pytest.raises(PoolNotServed, match="expandable_segments:False"):
            share(open_runtime(), [region_of(tensor)])
    finally:
        settings("expandable_segments:False")


def test_the_calibration_says_what_it_measured(caplog: pytest.LogCaptureFixture) -> None:
    pool = CudaPool.allocate(LAYOUT)
    with caplog.at_level("INFO", "kv_transfer"), Messenger(pool, TransferOptions(("cuda_ipc",)), name="gpu"):
        assert "GB/s" in caplog.text
    pool.close()


def test_a_cupy_array_is_a_pool() -> None:
    cupy = pytest.importorskip("cupy")
    array = cupy.zeros(LAYOUT.pool_bytes, dtype=cupy.uint8)
    pool = CudaPool.of_tensors(LAYOUT, [array])
    view = DeviceArray(pool.runtime, 0, (pool.bases[0], LAYOUT.pool_bytes), (LAYOUT.num_blocks, LAYOUT.block_bytes))
    view[:] = pattern(LAYOUT, 1)
    assert np.array_equal(cupy.asnumpy(array), pattern(LAYOUT, 1).reshape(-1))
    pool.close()
