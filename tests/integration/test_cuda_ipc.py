"""cuda_ipc around CUDA: order, handles, choices, errors. CUDA itself is played by its twin, which moves real bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kv_transfer import (
    CudaOptions,
    KVLayout,
    KVPool,
    Messenger,
    PoolNotServed,
    RankEndpoint,
    Received,
    Sent,
    TransferFailed,
    TransferOptions,
    TransportFailed,
)
from kv_transfer.errors import InvalidOptions
from kv_transfer.transports.cuda_ipc import calibration
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from kv_transfer.transports.cuda_ipc.runtime import open_runtime
from kv_transfer.transports.cuda_ipc.wire import MAGIC, PREFACE, socket_name
from tests.cuda_twin import LEGACY_STREAM, TwinRuntime
from tests.integration import kv_memory
from tests.integration.kv_pairs import Ranks, assert_moves
from tests.integration.kv_rank import LAYOUT, WAIT_S, differing, pattern, wait_for

OPTIONS = TransferOptions(protocols=("cuda_ipc",), cuda=CudaOptions(path="kernel"))


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwinRuntime]:
    """A CUDA of two devices that cannot reach each other; everything taken from it must be given back."""
    monkeypatch.setenv(kv_memory.TWIN, "2")
    kv_memory.twin.cache_clear()
    runtime = kv_memory.twin(2)
    yield runtime
    assert runtime.leftovers() == {"segments": 0, "streams": 0, "events": 0}
    kv_memory.twin.cache_clear()


@pytest.fixture
def ranks(twin: TwinRuntime) -> Iterator[Ranks]:
    """Closed before the twin looks at what is left."""
    with Ranks() as made:
        yield made


def layer(view: np.ndarray, number: int) -> np.ndarray:
    size = LAYOUT.layer_block_bytes
    return np.asarray(view)[:, number * size : (number + 1) * size]


def test_a_layer_is_fetched_when_it_is_computed_and_not_before(twin: TwinRuntime, ranks: Ranks) -> None:
    source, destination = ranks.pair(LAYOUT, OPTIONS)
    before = destination.view[:5].copy()
    destination.receive("r@1", [source.endpoint], range(5))
    twin.hold(LEGACY_STREAM)
    pool = source.pool
    assert isinstance(pool, CudaPool)
    pool.begin_pass()
    for number in range(LAYOUT.num_layers):
        pool.layer_done(number)
    source.send("r@1", range(5))
    right = source.view[:5]
    for number in range(LAYOUT.num_layers):
        assert np.array_equal(layer(destination.view[:5], number), layer(before, number))
        twin.step(LEGACY_STREAM)
        wait_for(lambda n=number: np.array_equal(layer(destination.view[:5], n), layer(right, n)))
    assert isinstance(destination.wait("r@1"), Received)
    twin.release(LEGACY_STREAM)


def test_blocks_of_an_engine_that_says_nothing_of_layers_are_fetched_when_all_it_launched_is_done(
    twin: TwinRuntime, ranks: Ranks
) -> None:
    source, destination = ranks.pair(LAYOUT, OPTIONS)
    assert_moves(source, destination, "warm@1")
    before = destination.view[:5].copy()
    destination.receive("r@1", [source.endpoint], range(5))
    twin.hold(LEGACY_STREAM)
    source.send("r@1", range(5))
    # As much time as the transfer would take: nothing announces that nothing happens.
    time.sleep(0.1)
    assert np.array_equal(destination.view[:5], before)
    twin.release(LEGACY_STREAM)
    assert isinstance(destination.wait("r@1"), Received)
    assert differing(LAYOUT, destination.view[:5], source.view[:5]) == []


def test_blocks_are_not_written_while_the_engine_that_had_them_still_uses_them(twin: TwinRuntime, ranks: Ranks) -> None:
    source, destination = ranks.pair(LAYOUT, OPTIONS)
    assert_moves(source, destination, "warm@1")
    before = destination.view[:5].copy()
    source.send("r@1", range(5))
    twin.hold(LEGACY_STREAM)
    destination.receive("r@1", [source.endpoint], range(5))
    time.sleep(0.1)
    assert np.array_equal(destination.view[:5], before)
    twin.release(LEGACY_STREAM)
    assert isinstance(destination.wait("r@1"), Received)


def test_an_abort_while_the_device_copies_is_told_when_it_no_longer_does(twin: TwinRuntime, ranks: Ranks) -> None:
    source, destination = ranks.pair(LAYOUT, OPTIONS)
    assert_moves(source, destination, "warm@1")
    stream = twin.streams()[-1]
    twin.hold(stream)
    destination.receive("r@1", [source.endpoint], range(5))
    source.send("r@1", range(5))
    wait_for(lambda: destination.counters()["cuda_ipc_chunks_under_way_total"] == 1)
    destination.abort("r@1", "its user has left")
    assert isinstance(source.wait("r@1"), TransferFailed)
    assert destination.messenger.poll() == []
    twin.release(stream)
    assert isinstance(destination.wait("r@1"), TransferFailed)
    destination.fill(9)
    assert_moves(source, destination, "r@2", others_hold=9)


def test_devices_that_cannot_reach_each_other_go_through_the_host_and_say_so(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(kv_memory.DEVICE, "1")
    source = ranks.remote(LAYOUT, OPTIONS, "prefill", 1)
    monkeypatch.setenv(kv_memory.DEVICE, "0")
    destination = ranks.local(LAYOUT, OPTIONS, "decode", 2)
    with caplog.at_level(logging.WARNING, "kv_transfer"):
        assert_moves(source, destination, "r@1")
    assert "GPU 0 cannot address the memory of GPU 1" in caplog.text
    assert destination.counters()["cuda_ipc_staged_links_total"] == 1


def test_devices_that_reach_each_other_are_copied_between_directly(
    twin: TwinRuntime, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin.peers.add(frozenset((0, 1)))
    monkeypatch.setenv(kv_memory.DEVICE, "1")
    source = ranks.remote(LAYOUT, OPTIONS, "prefill", 1)
    monkeypatch.setenv(kv_memory.DEVICE, "0")
    destination = ranks.local(LAYOUT, OPTIONS, "decode", 2)
    assert_moves(source, destination, "r@1")
    assert "cuda_ipc_staged_links_total" not in destination.counters()


def test_a_pool_is_mapped_once_for_all_links_of_a_process_and_unmapped_with_the_last(
    twin: TwinRuntime, ranks: Ranks
) -> None:
    source = ranks.remote(LAYOUT, OPTIONS, "prefill", 1)
    with Ranks() as inner:
        for name in ("decode 0", "decode 1"):
            assert_moves(source, inner.local(LAYOUT, OPTIONS, name, 2), f"{name}@1")
        assert twin.calls.count("import_memory") == 1


@pytest.mark.parametrize("call", ["launch", "import_memory"])
def test_a_call_of_cuda_that_fails_costs_the_transfer_and_not_the_process(
    call: str, twin: TwinRuntime, ranks: Ranks
) -> None:
    source, destination = ranks.remote(LAYOUT, OPTIONS, "prefill", 1), ranks.local(LAYOUT, OPTIONS, "decode", 2)
    twin.fails[call] = 1
    destination.receive("r@1", [source.endpoint], [1, 2])
    source.send("r@1", [3, 4])
    failed = destination.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert call in failed.reason
    assert_moves(source, destination, "r@2")


@pytest.mark.parametrize("path", ["kernel", "copies", "batch"])
def test_every_path_moves_the_same_bytes(path: str, twin: TwinRuntime, ranks: Ranks) -> None:
    twin.batches = True
    options = dataclasses.replace(OPTIONS, cuda=CudaOptions(path=path))
    source, destination = ranks.pair(LAYOUT, options)
    assert_moves(source, destination, "r@1")
    counted = {name for name, value in destination.counters().items() if name.startswith("cuda_ipc_") and value}
    assert counted == {f"cuda_ipc_{'kernel_launches' if path == 'kernel' else path + '_copies'}_total"}


def test_the_path_is_chosen_by_what_was_measured_and_reported(
    twin: TwinRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calibration, "BYTES", 4 << 20)
    twin.batches = True
    twin.gigabytes_per_s = {"kernel": 100.0, "copies": 150.0, "batch": 110.0}
    twin.seconds_a_call = {"kernel": 10e-6, "copies": 5e-6, "batch": 0.5e-6}
    pool = CudaPool.allocate(LAYOUT, 0, twin)
    options = TransferOptions(protocols=("cuda_ipc",))
    with caplog.at_level(logging.INFO, "kv_transfer"), Messenger(pool, options, name="prefill"):
        pass
    pool.close()
    assert "the copy kernel, from 256 KiB stretches on batch, from 4096 KiB stretches on copies" in caplog.text
    assert "GB/s" in caplog.text


def test_a_path_that_is_not_to_be_had_is_refused_with_what_it_needs(twin: TwinRuntime) -> None:
    options = dataclasses.replace(OPTIONS, cuda=CudaOptions(path="batch"))
    pool = CudaPool.allocate(LAYOUT, 0, twin)
    with pytest.raises(InvalidOptions, match="cuda-bindings"):
        Messenger(pool, options, name="prefill").start()
    pool.close()


def test_memory_that_no_other_process_can_open_is_refused_with_the_setting_to_change(twin: TwinRuntime) -> None:
    pool = CudaPool.allocate(LAYOUT, 0, twin)
    twin.make_unshareable(pool.bases[0])
    with pytest.raises(PoolNotServed):
        Messenger(pool, OPTIONS, name="prefill").start()
    with pytest.raises(PoolNotServed, match="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"):
        from kv_transfer.transports.cuda_ipc.regions import share

        share(twin, pool.regions)
    pool.close()


def test_a_region_in_the_middle_of_an_allocation_is_found_there(twin: TwinRuntime, ranks: Ranks) -> None:
    from kv_transfer.transports.cuda_ipc.regions import DeviceRegion, share

    base = twin.allocate(0, 4096)
    shared = share(twin, [DeviceRegion(base + 512, 1024, None), DeviceRegion(base + 2048, 64, None)])
    assert [(region.offset, region.num_bytes) for region in shared] == [(512, 1024), (2048, 64)]
    assert shared[0].handle == shared[1].handle
    twin.free(0, base)


def test_a_stranger_at_the_socket_is_told_nothing(ranks: Ranks) -> None:
    source = ranks.local(LAYOUT, OPTIONS, "prefill", 1)
    address = socket_name(str(source.endpoint.transports["cuda_ipc"]["nonce"]))
    for said in (PREFACE.pack(MAGIC, bytes(16)), b"x" * 24, b"x" * 100):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(WAIT_S)
            sock.connect(address)
            sock.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""


def test_a_gpu_that_this_process_does_not_see_is_named_with_what_to_do(ranks: Ranks) -> None:
    source, destination = ranks.pair(LAYOUT, OPTIONS)
    offer = {**source.endpoint.transports["cuda_ipc"], "device": "ab" * 16}
    hidden = RankEndpoint.from_dict({**source.endpoint.to_dict(), "transports": {"cuda_ipc": offer}})
    destination.receive("r@1", [hidden], [1])
    failed = destination.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert "CUDA_VISIBLE_DEVICES" in failed.reason


def test_a_gpus_pool_is_reached_by_tcp_from_a_host_without_one_both_ways(twin: TwinRuntime, ranks: Ranks) -> None:
    options = TransferOptions(protocols=("tcp",))
    on_gpu = ranks.local(LAYOUT, options, "gpu", pool=CudaPool.allocate(LAYOUT, 0, twin))
    memory = kv_memory.view_of(on_gpu.pool, LAYOUT)
    memory[:] = pattern(LAYOUT, 1)
    on_gpu.view = memory
    on_host = ranks.local(LAYOUT, options, "host", 2)
    assert_moves(on_gpu, on_host, "r@1")
    on_host.fill(3)
    assert_moves(on_host, on_gpu, "r@2")


def test_ipc_is_shared_memory_for_a_pool_in_host_memory_and_cuda_ipc_for_one_on_a_gpu(twin: TwinRuntime) -> None:
    options = TransferOptions(protocols=("ipc",), cuda=CudaOptions(path="kernel"))
    pool = CudaPool.allocate(LAYOUT, 0, twin)
    with Messenger(pool, options, name="gpu") as messenger:
        assert set(messenger.endpoint.transports) == {"cuda_ipc"}
    pool.close()
    with KVPool.allocate(LAYOUT) as host_pool, Messenger(host_pool, options, name="host") as messenger:
        assert set(messenger.endpoint.transports) == {"shm"}


def test_a_pool_in_host_memory_is_not_served_by_cuda_ipc(caplog: pytest.LogCaptureFixture) -> None:
    options = TransferOptions(protocols=("cuda_ipc", "tcp"))
    with (
        caplog.at_level(logging.WARNING, "kv_transfer"),
        KVPool.allocate(LAYOUT) as pool,
        Messenger(pool, options, name="prefill") as messenger,
    ):
        assert set(messenger.endpoint.transports) == {"tcp"}
    assert "this pool is not a CudaPool" in caplog.text


def test_a_host_without_cupy_or_a_gpu_says_which_is_missing() -> None:
    try:
        open_runtime()
    except TransportFailed as exc:
        assert "cupy" in str(exc) or "no CUDA device" in str(exc)
    else:
        pytest.skip("there is a GPU here")


def test_memory_that_a_stopped_peer_maps_is_not_freed_under_it(
    twin: TwinRuntime, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kv_transfer.transports.cuda_ipc.transport._CLOSE_TIMEOUT_S", 0.2)
    source, destination = ranks.local(LAYOUT, OPTIONS, "prefill", 1), ranks.remote(LAYOUT, OPTIONS, "decode", 2)
    destination.receive("r@1", [source.endpoint], [1])
    source.send("r@1", [2])
    assert isinstance(source.wait("r@1"), Sent)
    assert isinstance(destination.wait("r@1"), Received)
    destination.stop()
    source.close()
    assert "a peer still maps this KV pool" in caplog.text
    pool = source.pool
    assert isinstance(pool, CudaPool)
    (base,) = (segment.base for segment in twin._segments.values())
    twin.free(0, base)
    destination.resume()


@pytest.mark.parametrize("planes", [1, 2])
def test_tensors_of_another_size_than_the_layouts_are_refused(planes: int, twin: TwinRuntime) -> None:
    from kv_transfer.errors import PoolUnavailable
    from kv_transfer.transports.cuda_ipc.regions import DeviceRegion

    layout = KVLayout("e", "m", "uint8", 1, 1, 8, 1, 4, kv_planes=planes)
    base = twin.allocate(0, 4096)
    with pytest.raises(PoolUnavailable, match="regions of"):
        CudaPool(layout, [DeviceRegion(base, 7, None)], twin)
    twin.free(0, base)


@pytest.mark.parametrize("lane", ["cuda_ipc", "tcp"])
def test_an_engines_own_tensors_on_a_device_are_moved_where_they_are(twin: TwinRuntime, lane: str) -> None:
    """In strides of their own: heads before tokens in memory, under the shape that vLLM gives them."""
    layout = KVLayout("e", "m", "float16", 3, 4, 8, 4, 10)
    shape = (2, layout.num_blocks, layout.num_kv_heads, layout.block_size, layout.head_dim)
    options = dataclasses.replace(OPTIONS, protocols=(lane,))
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        sides = []
        for name in ("prefill", "decode"):
            addresses = [twin.allocate(0, 2 * int(np.prod(shape))) for _ in range(layout.num_layers)]
            for address in addresses:
                stack.callback(twin.free, 0, address)
            memory = [twin.bytes_at(address, 2 * int(np.prod(shape))) for address in addresses]
            tensors = [region.view(np.uint16).reshape(shape).transpose(0, 1, 3, 2, 4) for region in memory]
            for tensor in tensors:
                tensor[...] = rng.integers(0, 2**16, tensor.shape, dtype=np.uint16)
            names = ("plane", "block", "token", "head", "dim")
            pool = CudaPool.of_named_tensors(layout, tensors, names, runtime=twin)
            stack.callback(pool.close)
            messenger = stack.enter_context(Messenger(pool, options, name=name))
            sides.append((messenger, tensors))
        (source, sent), (destination, arrived) = sides
        wanted = [tensor.copy() for tensor in arrived]
        for mine, theirs in zip(wanted, sent, strict=True):
            mine[:, [1, 2, 9]] = theirs[:, [8, 0, 5]]
        destination.open_receive("r@1", [source.endpoint], [1, 2, 9], deadline_s=WAIT_S)
        source.open_send("r@1", num_blocks=3, deadline_s=WAIT_S)
        source.send_blocks("r@1", 0, [8, 0, 5])
        source.finish_send("r@1", b"")
        events: list[object] = []
        wait_for(lambda: bool(events.extend(destination.poll()) or events))
        assert [type(event) for event in events] == [Received]
        for mine, theirs in zip(arrived, wanted, strict=True):
            assert np.array_equal(mine, theirs)
