"""TransferOptions, and transports by name."""

from __future__ import annotations

import pytest

from kv_transfer.errors import InvalidOptions, UnknownTransport
from kv_transfer.options import TransferOptions, parse_protocols
from kv_transfer.transports.registry import installed_transports, load_transport, load_transports
from kv_transfer.transports.shm import ShmTransport
from kv_transfer.transports.tcp import TcpTransport


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("protocols", ()),
        ("protocols", ("IPC!",)),
        ("bind_host", "a b"),
        ("bind_host", "0.0.0.0"),
        ("control_port", -1),
        ("data_port", 65536),
        ("secret", ""),
        ("heartbeat_s", 0),
        ("silence_s", 1.5),
        ("chunk_bytes", 10),
        ("window_chunks", 0),
        ("tcp_streams", 1000),
        ("max_inflight", 0),
    ],
)
def test_a_bad_option_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InvalidOptions) as caught:
        TransferOptions(**{option: value})
    assert caught.value.option in (option, "advertise_host")


def test_a_wildcard_address_needs_one_to_advertise() -> None:
    assert TransferOptions(bind_host="0.0.0.0", advertise_host="10.0.0.1").public_host == "10.0.0.1"
    assert TransferOptions().public_host == "127.0.0.1"


def test_the_secret_is_not_shown() -> None:
    assert "hush" not in repr(TransferOptions(secret="hush"))


def test_protocols_are_read_as_users_write_them() -> None:
    assert parse_protocols("ipc, RDMA,,ipc") == ("ipc", "rdma")


def test_ipc_stands_for_shared_memory_and_a_transport_is_loaded_once() -> None:
    assert load_transports(("ipc", "shm", "tcp")) == [ShmTransport, TcpTransport]


def test_what_is_not_installed_is_named_with_what_is() -> None:
    with pytest.raises(UnknownTransport, match=r"'carrier_pigeon' is not installed; installed are: .*shm, tcp"):
        load_transport("carrier_pigeon")


def test_every_registered_transport_bears_the_name_it_is_registered_under() -> None:
    for name in installed_transports():
        try:
            assert load_transport(name).name == name
        except UnknownTransport as exc:
            assert "cannot be imported" in str(exc)
