"""Which blocks the connector sends, wants and gives up, as vLLM's scheduler tells it of requests."""

from __future__ import annotations

import pytest

from engine.settings import EngineSettings
from engine.vllm.options import ConnectorOptions
from engine.vllm.params import InvalidTransferParams, ReceiveParams, SendParams, decode_params, parse_params
from engine.vllm.plugin import engine_args
from engine.vllm.regions import ModelShape, layout_of
from engine.vllm.scheduler_side import LoadCounts, OpenSend, SchedulerSide, SendBlocks
from engine.vllm.versions import check_version
from kv_transfer.endpoint import RankEndpoint, endpoints_to_text
from kv_transfer.identity import ProcessIdentity
from kv_transfer.layout import KVLayout
from kv_transfer.options import RdmaOptions
from kv_transfer.protocol import WIRE_VERSION
from kv_transfer.tickets import NOT_WANTED
from splitwise_sched.errors import ConfigError

BLOCK = 32
LAYOUT = KVLayout("vllm", "m", "float32", num_layers=2, num_kv_heads=2, head_dim=4, block_size=BLOCK, num_blocks=64)
ENDPOINT = RankEndpoint(
    name="p", host="127.0.0.1", control_port=1, nonce="0" * 32, process=ProcessIdentity.own(), layout=LAYOUT,
    wire_version=WIRE_VERSION, transports={"tcp": {"port": 2}},
)  # fmt: skip
MODEL = ModelShape("vllm", "m", "float32", num_layers=2, num_blocks=64, block_size=BLOCK, num_kv_heads=8, tp_size=2,
                   tp_rank=1)  # fmt: skip


@pytest.fixture
def side() -> SchedulerSide:
    side = SchedulerSide(BLOCK, "engine-p")
    side.endpoints = endpoints_to_text([ENDPOINT])
    return side


def for_decode(num_tokens: int) -> dict[str, object]:
    return decode_params("t", [ENDPOINT], num_tokens)


def test_blocks_go_as_chunks_complete_them_and_the_partial_one_at_last(side):
    side.allocated("r", {"do_remote_decode": True, "transfer_id": "t"}, [7], 0, num_prompt=100)
    side.scheduled("r", [7, 8], 0, 40)
    first = side.take_plan()
    side.scheduled("r", [9, 10], 40, 60)
    second = side.take_plan()
    assert first.open_sends == [OpenSend("r", "t", 4)]
    assert first.send_blocks == [SendBlocks("r", "t", 0, (7,), False)]
    assert second.open_sends == []
    assert second.send_blocks == [SendBlocks("r", "t", 1, (8, 9, 10), True)]


def test_a_finished_prefill_keeps_its_blocks_and_tells_decode_where_they_are(side):
    side.allocated("r", {"do_remote_decode": True}, [], 0, num_prompt=33)
    side.scheduled("r", [1, 2], 0, 33)
    is_kept, params = side.finished("r", is_complete=True)
    assert is_kept
    parsed = parse_params(params)
    assert isinstance(parsed, ReceiveParams)
    assert (parsed.num_tokens, [e.name for e in parsed.source]) == (33, ["p"])
    assert side.take_plan().open_sends[0].transfer_id == parsed.transfer_id


def test_an_aborted_prefill_ends_its_transfer_before_its_blocks_are_free(side):
    side.allocated("r", {"do_remote_decode": True}, [], 0, num_prompt=100)
    side.scheduled("r", [1], 0, 32)
    assert side.finished("r", is_complete=False) == (True, None)
    assert side.take_plan().abort == ["r"]


def test_blocks_of_a_preempted_prefill_are_revoked_and_never_sent_again(side):
    params = {"do_remote_decode": True, "transfer_id": "t"}
    side.allocated("r", params, [], 0, num_prompt=100)
    side.scheduled("r", [1], 0, 32)
    side.take_plan()
    side.preempted(["r", "stranger"])
    assert side.take_plan().revoke == ["r"]
    side.allocated("r", params, [5, 6, 7, 8], 0, num_prompt=100)
    side.scheduled("r", [5, 6, 7, 8], 0, 100)
    plan = side.take_plan()
    assert (plan.open_sends, plan.send_blocks) == ([], [])
    assert side.finished("r", is_complete=True) == (False, None)


def test_a_preempted_prefill_that_nobody_can_have_asked_for_is_sent_under_another_name(side):
    side.allocated("r", {"do_remote_decode": True}, [], 0, num_prompt=40)
    side.scheduled("r", [1], 0, 32)
    (before,) = side.take_plan().open_sends
    side.preempted(["r"])
    side.allocated("r", {"do_remote_decode": True}, [5, 6], 0, num_prompt=40)
    side.scheduled("r", [5, 6], 0, 40)
    plan = side.take_plan()
    assert plan.revoke == ["r"]
    assert plan.open_sends[0].transfer_id != before.transfer_id
    assert plan.send_blocks == [SendBlocks("r", plan.open_sends[0].transfer_id, 0, (5, 6), True)]
    is_kept, answer = side.finished("r", is_complete=True)
    assert is_kept and answer["transfer_id"] == plan.open_sends[0].transfer_id


def test_decode_asks_once_for_what_it_lacks(side):
    params = for_decode(100)
    assert side.num_external_tokens("r", params, num_prompt=100, num_here=32) == 68
    assert side.num_external_tokens("r", params, num_prompt=100, num_here=32) == 68
    side.allocated("r", params, [4, 5, 6, 7], 68, num_prompt=100)
    side.allocated("r", params, [4, 5, 6, 7], 0, num_prompt=100)
    (receive,) = side.take_plan().receives
    assert receive.block_ids == (NOT_WANTED, 5, 6, 7)
    assert receive.is_awaited
    assert side.num_external_tokens("r", params, num_prompt=100, num_here=0) == 0


def test_prefill_hears_of_a_decode_that_has_it_all(side):
    params = for_decode(64)
    assert side.num_external_tokens("r", params, num_prompt=64, num_here=64) == 0
    side.allocated("r", params, [4, 5], 0, num_prompt=64)
    (receive,) = side.take_plan().receives
    assert receive.block_ids == (NOT_WANTED, NOT_WANTED)
    assert not receive.is_awaited


def test_a_decode_that_is_aborted_while_its_kv_comes_ends_the_transfer(side):
    side.allocated("r", for_decode(64), [4, 5], 64, num_prompt=64)
    side.take_plan()
    assert side.finished("r", is_complete=False) == (False, None)
    assert side.take_plan().abort == ["r"]


def test_decode_says_at_the_end_whether_its_kv_did_not_come(side):
    for request_id in ("came", "lost", "gone"):
        side.allocated(request_id, for_decode(64), [4, 5], 64, num_prompt=64)
    side.finished("gone", is_complete=False)
    side.received(["came", "lost", "gone"], ["lost", "gone"])
    ends = {request_id: side.finished(request_id, is_complete=True) for request_id in ("came", "lost", "gone")}
    assert ends == {"came": (False, None), "lost": (False, {"kv_load_failed": True}), "gone": (False, None)}
    assert side.take_counts() == LoadCounts(num_ended=2, num_failed=1)
    assert side.take_counts() is None


def test_a_request_without_parameters_is_none_of_the_connectors(side):
    assert side.num_external_tokens("r", None, 10, 0) == 0
    side.allocated("r", None, [1], 0, 10)
    side.scheduled("r", [1], 0, 10)
    assert side.finished("r", is_complete=True) == (False, None)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"do_remote_decode": True, "do_remote_prefill": True}, "exclude each other"),
        ({"do_remote_prefill": True}, "transfer_id is missing"),
        ({"do_remote_decode": True, "transfer_id": "a b"}, "transfer_id is 'a b'"),
        ({**for_decode(10), "remote_num_tokens": 0}, "remote_num_tokens is '0'"),
        ({**for_decode(10), "remote_num_tokens": True}, "remote_num_tokens is 'True'"),
        ({**for_decode(10), "remote_endpoints": "http://elsewhere"}, "remote_endpoints cannot be used"),
    ],
)
def test_parameters_that_cannot_be_used_are_named_and_the_request_is_computed_whole(side, params, named):
    with pytest.raises(InvalidTransferParams, match=named):
        parse_params(params)
    assert side.num_external_tokens("r", params, 10, 0) == 0


def test_parameters_say_send_receive_or_nothing():
    assert parse_params(None) is None
    assert parse_params({"do_remote_decode": False}) is None
    assert parse_params({"do_remote_decode": True}) == SendParams(None)


@pytest.mark.parametrize(
    ("shape", "axes", "planes"),
    [
        ((64, 4, BLOCK, 16), "head", 1),
        ((2, 64, BLOCK, 4, 8), "token+head", 2),
        ((64, 2, BLOCK, 4, 8), "token+head", 2),
        ((64, BLOCK, 576), "token", 1),
    ],
)
def test_known_shapes_have_a_layout(shape, axes, planes):
    layout, names = layout_of(MODEL, shape)
    assert (layout.axes, layout.kv_planes, layout.head_dim) == (axes, planes, shape[-1])
    assert len(names) == len(shape)


@pytest.mark.parametrize(("shape", "named"), [((64, 4), "does not know"), ((64, 4, 16, 16), "--block-size 16")])
def test_unknown_shapes_are_refused(shape, named):
    with pytest.raises(ConfigError, match=named):
        layout_of(MODEL, shape)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"protocol": "tcp"}, "known are"),
        ({"transfer_timeout_s": 0}, "transfer_timeout_s is 0"),
        ({"endpoint_dir": 3}, "endpoint_dir is 3"),
        ({"silence_s": 0.1}, "silence_s"),
        ({"rdma": "write"}, "rdma is 'write': give an object"),
        ({"rdma": {"modus": "write"}}, "rdma has 'modus': known are gid_index"),
        ({"rdma": {"mode": "push"}}, r"rdma\.mode: is 'push'"),
        ({"cuda": {"path": 3}}, r"cuda\.path"),
    ],
)
def test_extra_configuration_that_cannot_work_is_named(extra, named):
    with pytest.raises(ConfigError, match=named):
        ConnectorOptions.parse(extra)


def test_extra_configuration_takes_what_transfers_take():
    options = ConnectorOptions.parse({"protocols": "ipc, tcp", "transfer_timeout_s": 5, "secret": "s"})
    assert (options.transfer.protocols, options.transfer.secret, options.transfer_timeout_s) == (("ipc", "tcp"), "s", 5)
    nested = ConnectorOptions.parse({"rdma": {"mode": "write", "nics": ["mlx5_0"]}}).transfer
    assert nested.rdma == RdmaOptions(mode="write", nics=("mlx5_0",))


def test_another_vllm_is_refused_by_name():
    check_version("0.32.3")
    with pytest.raises(ConfigError, match=r"vLLM 0\.11\.0 is installed; this connector supports 0\.32\.x"):
        check_version("0.11.0")


def test_flags_become_vllms_and_those_that_it_has_not_are_refused():
    settings = EngineSettings(engine="vllm", model="m", max_num_seqs=8, engine_args='{"seed": 3, "max_num_seqs": 9}')
    args = engine_args(settings)
    assert (args["model"], args["max_num_seqs"], args["seed"], args["block_size"]) == ("m", 9, 3, 32)
    for flag, value in (("kv_memory_mb", 1), ("num_threads", 2)):
        with pytest.raises(ConfigError, match=flag.replace("_", "-")):
            engine_args(EngineSettings(engine="vllm", model="m", **{flag: value}))
    with pytest.raises(ConfigError, match="--engine-args is"):
        engine_args(EngineSettings(engine="vllm", model="m", engine_args="[1]"))
