"""Ids, requests and results of FastDeploy's shape come out as they went in, or are refused by name."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_sched.codec import decode_request, encode_request
from splitwise_sched.errors import InvalidRequest
from splitwise_sched.fastdeploy.ids import run_name, safe_id
from splitwise_sched.fastdeploy.messages import error_dict, output_of, request_of, result_dict, run_of
from splitwise_sched.fastdeploy.objects import Classes, CompletionOutput, Request, RequestOutput
from splitwise_sched.fastdeploy.pairing import MAX_DISAGGREGATED_CHARS, disaggregate_info
from splitwise_sched.fastdeploy.plain import MAX_DEPTH, plain
from splitwise_sched.fastdeploy.runs import MAX_EARLY, MAX_OVER, EarlyResults, Runs
from splitwise_sched.outputs import decode_output, encode_output
from splitwise_sched.types import FinishReason, Output, SamplingParams, check_id
from splitwise_sched.types import Request as OurRequest

user_ids = st.text(min_size=1, max_size=60).filter(lambda s: not re.search("[\ud800-\udfff]", s))


def submitted(theirs, **more):
    request = request_of(theirs, **{"model": "m", "max_model_len": 1000, "ttl_s": 60, **more})
    return decode_request(encode_request(request))


# ---- ids -----------------------------------------------------------------------------------------------------------


@given(st.lists(user_ids | st.sampled_from(["a#", "fd:a:23", "fd::23", "fdh:" + "0" * 64, "x" * 500]), unique=True))
def test_every_id_becomes_a_usable_one_of_its_own(ids):
    safe = [check_id("request", safe_id(i)) for i in ids]
    assert len(set(safe)) == len(ids)
    assert safe == [safe_id(i) for i in ids]


def test_usable_ids_stay_and_odd_ones_stay_readable():
    assert safe_id("chatcmpl-1.2:3") == "chatcmpl-1.2:3"
    assert safe_id("a#1 ü") == "fd:a:231:20:c3:bc"
    assert safe_id("fd:a") == "fd:fd:3aa"
    assert re.fullmatch("fdh:[0-9a-f]{64}", safe_id("x" * 200))


@pytest.mark.parametrize("bad", ["", 7, None, "x" * 5000, "\ud800"])
def test_what_is_no_id_is_refused(bad):
    with pytest.raises(InvalidRequest, match="request_id"):
        safe_id(bad)


@given(st.lists(st.tuples(user_ids | st.from_regex(r"a(#\d)?(#\d)?", fullmatch=True), st.integers(1, 30)), unique=True))
def test_no_two_runs_have_one_name(runs):
    assert len({run_name(*run) for run in runs}) == len(runs)


def test_first_run_has_the_name_that_its_user_gave():
    assert [run_name("a", 1), run_name("a", 2), run_name("a#2", 1)] == ["a", "a#2", "a#2#1"]


# ---- plain values --------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: int
    y: float


class Colour(Enum):
    RED = "red"


@dataclass
class Leaf:
    size: int


def test_values_of_engines_become_json_values():
    class Told:
        def to_dict(self):
            return {"told": Leaf(3)}

    value = {
        "a": np.arange(3),
        "b": np.float32(0.5),
        "c": Point(1, float("nan")),
        "d": Colour.RED,
        "e": Told(),
        "f": True,
    }
    assert plain(value, "it") == {
        "a": [0, 1, 2], "b": 0.5, "c": [1, None], "d": "red", "e": {"told": {"size": 3}}, "f": True,
    }  # fmt: skip


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": object()}}, "it.a.b is a object, which is no JSON value"),
        ({"a": b"bytes"}, "it.a is a bytes"),
        ({1: 2}, "it has the key 1: it must be text"),
        (deep(MAX_DEPTH + 1), "nested deeper than"),
        (1 << 64, "it must be a 64-bit integer"),
    ],
)
def test_what_is_no_json_value_is_refused_by_its_path(value, message):
    with pytest.raises(InvalidRequest, match=message):
        plain(value, "it")


# ---- requests ------------------------------------------------------------------------------------------------------


def test_request_comes_to_its_engine_as_it_was_put_in():
    theirs = Request("a#1", [5, 6, 7], 20, "words", others={"tools": [{"x": None}], "top_p": 0.5, "min_tokens": 3})
    run = run_of(submitted(theirs), 1, starts_here=True, info={"role": "decode"})
    theirs.disaggregate_info = {"role": "decode"}
    theirs.request_id = run.name = "a#1#1"
    assert Request.from_dict(run.data) == theirs


def test_rerun_has_the_emitted_tokens_in_its_prompt_and_makes_only_the_rest():
    request = submitted(Request("a", [5, 6, 7], 20, others={"min_tokens": 3}))
    rerun = OurRequest(
        request.request_id, "m", request.prompt_token_ids, request.sampling, (8, 9), metadata=request.metadata
    )
    run = run_of(rerun, 4, starts_here=True, info=None)
    assert run.name == "a#4" and run.num_input_tokens == 5
    assert run.data["prompt_token_ids"] == [5, 6, 7, 8, 9] and run.data["prompt_token_ids_len"] == 5
    assert (run.data["max_tokens"], run.data["min_tokens"]) == (18, 1)


def test_request_of_another_front_end_comes_with_its_sampling_parameters():
    request = OurRequest("r", "m", (1, 2), SamplingParams(max_tokens=9, temperature=0.5, stop=("x",)))
    run = run_of(decode_request(encode_request(request)), 1, starts_here=True, info=None)
    theirs = Request.from_dict(run.data)
    assert (theirs.request_id, theirs.max_tokens, theirs.prompt_token_ids) == ("r", 9, [1, 2])
    assert theirs.others["temperature"] == 0.5 and theirs.others["stop"] == ["x"]


@pytest.mark.parametrize("metadata", [{"fastdeploy": 1}, {"fastdeploy": {}}, {"fastdeploy": {"request_id": 7}}])
def test_metadata_that_this_interface_does_not_write_are_refused(metadata):
    with pytest.raises(InvalidRequest, match="has no fastdeploy map with a request_id"):
        run_of(OurRequest("r", "m", (1,), metadata=metadata), 1, starts_here=True, info=None)


@pytest.mark.parametrize(("asked", "limit"), [(7, 7), (None, 997), (0, 997)])
def test_kv_is_reserved_for_the_tokens_asked_for_or_all_that_the_model_takes(asked, limit):
    assert submitted(Request("r", [1, 2, 3], asked)).sampling.max_tokens == limit


def test_things_that_are_no_requests_are_refused():
    no_dict = types.SimpleNamespace(request_id="r")
    with pytest.raises(InvalidRequest, match=r"it must have to_dict\(\)"):
        submitted(no_dict)
    no_dict.to_dict = lambda: 3
    with pytest.raises(InvalidRequest, match=r"to_dict\(\) gave a int"):
        submitted(no_dict)
    with pytest.raises(InvalidRequest, match="no prompt_token_ids"):
        submitted(Request("r", ["one"]))


# ---- results -------------------------------------------------------------------------------------------------------


def run(starts_here=True, emitted=()):
    request = OurRequest("r", "m", (1, 2), SamplingParams(max_tokens=10), tuple(emitted), metadata={
        "fastdeploy": {"request_id": "u", "max_tokens": 10}})  # fmt: skip
    return run_of(request, 1, starts_here=starts_here, info=None)


def result(send_idx, tokens, **more):
    return RequestOutput("u", CompletionOutput(0, send_idx, tokens, "text"), metrics={"t": 1.5}, **more)


def through(output: Output) -> Output:
    got = decode_output(output.request_id, encode_output(output))
    assert got == output
    return got


def test_result_comes_to_its_user_as_it_was_put_in():
    ours = run()
    for theirs in (result(0, [7]), result(1, [8, 9]), result(3, [4], finished=True)):
        output = through(output_of(ours, theirs, is_prefill=False))
        assert output.index == theirs.outputs.send_idx
        assert RequestOutput.from_dict(result_dict("u", output)) == theirs


def test_positions_of_a_rerun_follow_on_what_its_user_has():
    ours = run(emitted=(1, 2, 3))
    outputs = [output_of(ours, result(i, [i]), is_prefill=False) for i in range(2)]
    assert [o.index for o in outputs] == [3, 4]
    assert [result_dict("u", o)["outputs"]["send_idx"] for o in outputs] == [3, 4]


@pytest.mark.parametrize(("send_idx", "index"), [(1, 1), (0, 0), (None, 1), (-1, 1)])
def test_decode_goes_on_where_its_first_result_says_or_behind_the_first_token(send_idx, index):
    ours = run(starts_here=False)
    assert output_of(ours, result(send_idx, [5]), is_prefill=False).index == index
    assert output_of(ours, result(send_idx, [5]), is_prefill=False).index == index + 1


def test_first_token_of_prefill_does_not_finish_a_request_unless_it_failed():
    assert output_of(run(), result(0, [7], finished=True), is_prefill=True).finish_reason is None
    failed = output_of(run(), result(0, [7], finished=True, error_code=400, error_msg="no"), is_prefill=True)
    assert (failed.finish_reason, failed.detail) == (FinishReason.ERROR, "no")


@pytest.mark.parametrize(("tokens", "reason"), [([1] * 10, FinishReason.LENGTH), ([1], FinishReason.STOP)])
def test_end_is_by_length_when_all_tokens_are_there(tokens, reason):
    assert output_of(run(), result(0, tokens, finished=True), is_prefill=False).finish_reason is reason


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (result(0, ["7"]), "it must be a list of token ids"),
        (result(0, [7], prompt="x" * (2 << 20)), "more than 1048576"),
        (RequestOutput("u", None, metrics={"x": object()}), "metrics.x is a object"),
    ],
)
def test_result_that_cannot_be_sent_is_refused(theirs, message):
    with pytest.raises(InvalidRequest, match=message):
        output_of(run(), theirs, is_prefill=False)


def test_end_that_no_engine_told_has_all_parts_that_a_strict_class_needs():
    ended = result_dict("u", Output("r", 1, 4, finish_reason=FinishReason.LENGTH))
    assert ended["finished"] and ended["error_code"] == 200 and ended["outputs"]["token_ids"] == []
    expired = error_dict("u", "too late")
    assert expired["finished"] and expired["error_code"] == 500 and expired["metrics"]["arrival_time"] > 0
    told = error_dict("u", "bad", {"error_code": 507, "outputs": None, "metrics": None})
    assert told["error_code"] == 507 and told["outputs"]["send_idx"] == -1 and told["metrics"]
    cancelled = result_dict("u", Output("r", 2, 4, finish_reason=FinishReason.CANCELLED, detail="by its user"))
    assert cancelled["error_code"] == 500 and cancelled["error_msg"] == "by its user"


# ---- pairs, classes, runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "same_host", "chosen"),
    [
        (["ipc", "rdma"], True, "ipc"),
        (["ipc", "rdma"], False, "rdma"),
        (["rdma", "ipc"], True, "ipc"),
        (["ipc"], False, "ipc"),
        (["rdma"], True, "rdma"),
        ("ipc,rdma", False, "rdma"),
        (["tcp", "ipc"], True, "tcp"),
    ],
)
def test_protocol_goes_by_the_hosts(offered, same_host, chosen):
    info = disaggregate_info(
        json.dumps({"role": "decode", "transfer_protocol": offered}), "a", "a" if same_host else "b"
    )
    assert info == {"role": "decode", "transfer_protocol": chosen}


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", "[" * 50_000, '"' + "x" * MAX_DISAGGREGATED_CHARS + '"'])
def test_peer_that_announces_nothing_usable_has_no_info(text):
    assert disaggregate_info(text, "a", "a") is None


def test_classes_are_those_given_then_those_seen_then_the_loaded_engine_s_then_ours(monkeypatch):
    class Theirs:
        pass

    assert (Classes().request, Classes().output) == (Request, RequestOutput)
    loaded = types.SimpleNamespace(Request=Theirs, RequestOutput=Theirs)
    monkeypatch.setitem(sys.modules, "fastdeploy.engine.request", loaded)
    assert (Classes().request, Classes().output) == (Theirs, Theirs)
    classes = Classes()
    classes.saw_request(Leaf(1))
    classes.saw_output(Colour.RED)
    assert (classes.request, classes.output) == (Leaf, Colour)
    assert (Classes(Point, Request).request, Classes(Point, Request).output) == (Point, Request)


def test_runs_that_nothing_is_told_of_are_forgotten_those_handed_over_sooner():
    runs = Runs()
    first, second, third = (run_of(OurRequest(i, "m", (1,)), 1, starts_here=True, info=None) for i in "abc")
    for one in (first, second, third):
        one.told_at = 100.0
        runs.add(one, waits=one is first)
    second.is_handed_over = True
    third.told_at = 150.0
    assert runs.forget_silent(161.0, 70.0) == [second]
    assert runs.forget_silent(180.0, 70.0) == [first]
    assert list(runs.waiting) == [] and len(runs) == 1 and runs.is_over("a") and runs.is_over("b")
    assert runs.get("c") is third


def test_what_is_remembered_of_runs_is_bounded():
    runs, early = Runs(), EarlyResults()
    for i in range(MAX_OVER + 5):
        runs.add(run_of(OurRequest(f"r{i}", "m", (1,)), 1, starts_here=True, info=None), waits=False)
        runs.drop(f"r{i}", 1)
    assert not runs.is_over("r0") and runs.is_over(f"r{MAX_OVER + 4}") and len(runs) == 0
    for i in range(MAX_EARLY + 5):
        early.hold(0.0, str(i), i)
    assert early.take("0") == [] and early.take("7") == [7] and early.take("7") == []
    early.hold(1000.0, "new", 1)
    assert early.take("9") == [] and early.take("new") == [1]
