"""Which transport a pair uses, and who is told when it is not the one that it should be."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import textwrap

import pytest

from kv_transfer import (
    KVPool,
    Messenger,
    RankEndpoint,
    Received,
    TransferFailed,
    TransferOptions,
    TransportFailed,
    UnknownTransport,
)
from tests.integration.kv_pairs import Ranks
from tests.integration.kv_rank import LAYOUT, ROOT, LocalRank, differing, wait_for


def rank(ranks: Ranks, name: str, *protocols: str) -> LocalRank:
    return ranks.local(LAYOUT, TransferOptions(protocols=protocols), name, seed=len(name))


def move(source: LocalRank, destination: LocalRank, endpoint: RankEndpoint) -> Received | TransferFailed:
    destination.receive("r@1", [endpoint], range(9))
    source.send("r@1", range(20, 29))
    event = destination.wait("r@1")
    assert isinstance(event, Received | TransferFailed)
    return event


def changed(endpoint: RankEndpoint, **fields: object) -> RankEndpoint:
    return RankEndpoint.from_dict({**endpoint.to_dict(), **fields})


@pytest.mark.parametrize(
    ("mine", "theirs", "lane"),
    [
        (("ipc", "tcp"), ("ipc", "tcp"), "shm"),
        (("tcp", "shm"), ("shm", "tcp"), "tcp"),
        (("shm", "tcp"), ("tcp",), "tcp"),
        (("tcp",), ("shm", "tcp"), "tcp"),
    ],
)
def test_the_destinations_first_choice_among_what_both_have_is_used(
    ranks: Ranks, mine: tuple[str, ...], theirs: tuple[str, ...], lane: str
) -> None:
    source, destination = rank(ranks, "prefill", *theirs), rank(ranks, "decode", *mine)
    event = move(source, destination, source.endpoint)
    assert isinstance(event, Received)
    assert event.stats.lane == lane
    assert destination.counters()["downgrades_total"] == 0


def test_another_host_is_reached_by_tcp_without_a_warning(ranks: Ranks) -> None:
    source, destination = rank(ranks, "prefill", "ipc", "tcp"), rank(ranks, "decode", "ipc", "tcp")
    event = move(source, destination, changed(source.endpoint, host_id="another/pid:[1]"))
    assert isinstance(event, Received)
    assert event.stats.lane == "tcp"
    assert destination.counters()["downgrades_total"] == 0


def test_a_lane_that_should_work_and_does_not_is_a_warning_and_a_counted_downgrade(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    source, destination = rank(ranks, "prefill", "ipc", "tcp"), rank(ranks, "decode", "ipc", "tcp")
    offers = {name: dict(offer) for name, offer in source.endpoint.transports.items()}
    offers["shm"]["nonce"] = secrets.token_hex(16)
    with caplog.at_level(logging.WARNING, "kv_transfer"):
        event = move(source, destination, changed(source.endpoint, transports=offers))
    assert isinstance(event, Received)
    assert event.stats.lane == "tcp"
    assert differing(LAYOUT, destination.view[:9], source.view[20:29]) == []
    assert destination.counters()["downgrades_total"] == 1
    assert "over tcp instead of shm" in caplog.text
    assert "another pool than the one announced" in caplog.text


def test_a_file_that_is_no_pool_is_not_mapped(ranks: Ranks) -> None:
    source, destination = rank(ranks, "prefill", "shm"), rank(ranks, "decode", "shm")
    with open(__file__, "rb") as file:
        offer = {"fd": file.fileno(), "nonce": source.pool.nonce.hex()}
        destination.receive("r@1", [changed(source.endpoint, transports={"shm": offer})], [1])
        failed = destination.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert "no transport reaches prefill" in failed.reason


def test_a_pair_without_a_common_lane_fails_with_the_reason_for_each(ranks: Ranks) -> None:
    source, destination = rank(ranks, "prefill", "shm"), rank(ranks, "decode", "shm", "tcp")
    event = move(source, destination, changed(source.endpoint, host_id="another/pid:[1]"))
    assert isinstance(event, TransferFailed)
    assert "shm: it is on another host" in event.reason
    assert "tcp: the peer does not offer it" in event.reason


def test_a_protocol_that_is_not_installed_is_named_with_those_that_are() -> None:
    with KVPool.allocate(LAYOUT) as pool, pytest.raises(UnknownTransport) as caught:
        Messenger(pool, TransferOptions(protocols=("carrier_pigeon",)), name="m")
    assert caught.value.name == "carrier_pigeon"
    assert {"shm", "tcp"} <= set(caught.value.installed)
    assert "shm, tcp" in str(caught.value)


@pytest.mark.parametrize("which", ["control_port", "data_port"])
def test_a_port_that_is_taken_is_named(which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, KVPool.allocate(LAYOUT) as pool:
        port = taken.getsockname()[1]
        messenger = Messenger(pool, TransferOptions(protocols=("tcp",), **{which: port}), name="m")
        with pytest.raises(TransportFailed, match=f"port {port}"):
            messenger.start()
        messenger.close()


def test_a_full_dev_shm_costs_nobody_a_pool_or_a_transfer() -> None:
    program = textwrap.dedent("""
        from tests.integration.kv_rank import LAYOUT, LocalRank
        from kv_transfer import Received, TransferOptions
        source, destination = (LocalRank(LAYOUT, TransferOptions(protocols=("shm",)), name, 1) for name in "pd")
        destination.receive("r@1", [source.endpoint], [1, 2])
        source.send("r@1", [1, 2])
        assert isinstance(destination.wait("r@1"), Received)
        destination.close()
        source.close()
        print("moved")
    """)
    fill = "mount -t tmpfs -o size=64k full /dev/shm && ! dd if=/dev/zero of=/dev/shm/x bs=64k count=2 2>/dev/null"
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
    try:
        allowed = subprocess.run([*unshare, fill], capture_output=True, timeout=60, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        assert os.environ.get("CI") != "true", "this host cannot make a mount namespace"
        pytest.skip("this host cannot make a mount namespace")
    command = [*unshare, f'{fill}; exec "$0" -c "$1"', sys.executable, program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "moved\n", "")


def test_a_source_that_was_connected_to_eagerly_is_up_before_the_first_transfer(ranks: Ranks) -> None:
    source, destination = rank(ranks, "prefill", "shm", "tcp"), rank(ranks, "decode", "tcp")
    destination.messenger.connect([source.endpoint])
    wait_for(lambda: [lane.state for lane in destination.messenger.lanes()] == ["up"])
    (before,) = destination.messenger.lanes()
    assert (before.lane, before.num_bytes, before.instead_of) == ("tcp", 0, "")
    assert isinstance(move(source, destination, source.endpoint), Received)
    (after,) = destination.messenger.lanes()
    assert after.num_bytes == 9 * LAYOUT.block_bytes
    assert after.num_chunks >= 1
    assert after.num_descriptors >= 1
    assert (after.num_transfers, after.under_way_chunks, after.waiting_chunks) == (0, 0, 0)


def test_what_stands_in_the_way_of_an_eager_connection_is_logged_and_fails_the_first_transfer(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    source, destination = rank(ranks, "prefill", "shm"), rank(ranks, "decode", "tcp")
    with caplog.at_level(logging.WARNING, "kv_transfer"):
        destination.messenger.connect([source.endpoint])
        event = move(source, destination, source.endpoint)
    assert isinstance(event, TransferFailed)
    assert "the peer does not offer it" in event.reason
    assert "cannot fetch from prefill" in caplog.text


def test_a_downgrade_shows_in_the_report_of_the_lane(ranks: Ranks) -> None:
    source, destination = rank(ranks, "prefill", "ipc", "tcp"), rank(ranks, "decode", "ipc", "tcp")
    offers = {name: dict(offer) for name, offer in source.endpoint.transports.items()}
    offers["shm"]["nonce"] = secrets.token_hex(16)
    assert isinstance(move(source, destination, changed(source.endpoint, transports=offers)), Received)
    (lane,) = destination.messenger.lanes()
    assert (lane.lane, lane.instead_of) == ("tcp", "shm")
