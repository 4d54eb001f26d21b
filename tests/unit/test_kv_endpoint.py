"""RankEndpoint: a record that comes from elsewhere, and is believed only as far as it makes sense."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_transfer.endpoint import MAX_ENDPOINTS_CHARS, RankEndpoint, endpoints_from_text, endpoints_to_text
from kv_transfer.errors import InvalidEndpoint
from kv_transfer.identity import ProcessIdentity, host_id, open_pidfd, process_start
from kv_transfer.layout import KVLayout

ENDPOINT = RankEndpoint(
    name="prefill-0",
    host="10.0.0.1",
    control_port=4000,
    nonce="0123456789abcdef" * 2,
    process=ProcessIdentity("boot/pid:[1]", 7, 12345),
    layout=KVLayout("transformers", "m", "float32", 2, 4, 8, 16, 10, tp_size=2, tp_rank=1, pp_layers=(1, 1), pp_rank=1),
    wire_version=1,
    transports={"shm": {"fd": 5, "nonce": "ab"}, "tcp": {"port": 4001}},
)


def test_an_endpoint_survives_json() -> None:
    assert RankEndpoint.from_dict(json.loads(json.dumps(ENDPOINT.to_dict()))) == ENDPOINT
    assert (ENDPOINT.tp_rank, ENDPOINT.tp_size) == (1, 2)


def test_all_ranks_of_an_instance_travel_as_one_text() -> None:
    assert endpoints_from_text(endpoints_to_text([ENDPOINT, ENDPOINT])) == [ENDPOINT, ENDPOINT]


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", "[7]", "[" * 100_000, " " * (MAX_ENDPOINTS_CHARS + 1)])
def test_a_text_that_is_no_list_of_endpoints_is_refused(text: str) -> None:
    with pytest.raises(InvalidEndpoint):
        endpoints_from_text(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", "evil host"),
        ("host", "a;b"),
        ("host", ""),
        ("control_port", 0),
        ("control_port", 70000),
        ("control_port", "4000"),
        ("control_port", True),
        ("nonce", "xyz"),
        ("name", ""),
        ("name", "a\x1b[31m"),
        ("pid", -1),
        ("pid_start", None),
        ("wire_version", 0),
        ("layout", {}),
        ("layout", None),
        ("transports", []),
        ("transports", {"../shm": {}}),
        ("transports", {"shm": 1}),
        ("transports", {"shm": {"fd": 1.5}}),
        ("transports", {"shm": {"fd": 2**70}}),
        ("transports", {"shm": {"nonce": "x" * 1000}}),
        ("transports", {f"t{i}": {} for i in range(99)}),
    ],
)
def test_a_bad_field_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidEndpoint):
        RankEndpoint.from_dict({**ENDPOINT.to_dict(), field: value})


def test_missing_and_unknown_fields_are_refused_by_name() -> None:
    for field in ENDPOINT.to_dict():
        record = ENDPOINT.to_dict()
        del record[field]
        with pytest.raises(InvalidEndpoint):
            RankEndpoint.from_dict(record)
    with pytest.raises(InvalidEndpoint, match="colour"):
        RankEndpoint.from_dict({**ENDPOINT.to_dict(), "colour": "red"})
    with pytest.raises(InvalidEndpoint, match="must be a mapping"):
        RankEndpoint.from_dict("text")


anything = st.recursive(
    st.none() | st.integers() | st.text(max_size=20) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*ENDPOINT.to_dict(), "x"]), anything, max_size=4))
def test_no_record_gets_past_from_dict_with_another_error(patch: dict[str, object]) -> None:
    try:
        RankEndpoint.from_dict({**ENDPOINT.to_dict(), **patch})
    except InvalidEndpoint:
        pass


def test_this_process_is_visible_and_a_recycled_pid_or_another_host_is_not() -> None:
    own = ProcessIdentity.own()
    assert own.is_visible
    assert not ProcessIdentity(own.host, own.pid, own.start + 1).is_visible
    assert not ProcessIdentity("another", own.pid, own.start).is_visible
    fd = open_pidfd(own)
    assert fd is not None
    os.close(fd)
    assert open_pidfd(ProcessIdentity(own.host, own.pid, own.start + 1)) is None
    assert process_start(2**22 + 1) is None
    assert host_id() == own.host
