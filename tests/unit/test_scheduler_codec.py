"""What crosses Redis comes out as it went in; what does not come from us is refused, never believed."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_sched.codec import MAX_BODY_BYTES, decode_request, encode_request
from splitwise_sched.errors import InvalidRequest
from splitwise_sched.outputs import Lost, MalformedOutput, decode_output, encode_output
from splitwise_sched.types import FinishReason, Output, Request, SamplingParams, TokenLogprob

token_ids = st.integers(0, 2**32 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
json_maps = st.dictionaries(st.text(max_size=8), json_values, max_size=5)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10**6),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.001, 1),
    top_k=st.integers(0, 10**6),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=20).filter(lambda s: "\ud800" not in s), max_size=4).map(tuple),
    stop_token_ids=st.lists(token_ids, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
requests = st.builds(
    Request,
    request_id=st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True),
    model=st.text(max_size=50),
    prompt_token_ids=st.lists(token_ids, min_size=1, max_size=50).map(tuple),
    sampling=samplings,
    emitted_token_ids=st.lists(token_ids, max_size=20).map(tuple),
    timeout_s=st.none() | st.floats(0.1, 86400),
    metadata=json_maps,
)
logprobs = st.floats(-100, 0)
outputs = st.builds(
    Output,
    request_id=st.just("r"),
    epoch=st.integers(1, 10**6),
    index=st.integers(0, 10**6),
    token_ids=st.lists(token_ids, max_size=10).map(tuple),
    logprobs=st.lists(
        st.builds(TokenLogprob, token_ids, logprobs, st.lists(st.tuples(token_ids, logprobs), max_size=3).map(tuple)),
        max_size=4,
    ).map(tuple),
    finish_reason=st.none(),
    extra=st.none() | json_maps,
)


@given(requests)
def test_request_comes_out_of_its_body_as_it_went_in(request):
    assert decode_request(encode_request(request)) == request


@pytest.mark.parametrize("timeout_s", [0, -1.0, 86401, float("nan"), float("inf")])
def test_a_time_out_that_ends_at_once_or_never_is_refused(timeout_s):
    with pytest.raises(InvalidRequest, match=f"timeout_s is {timeout_s!r}"):
        Request("r", "m", (1,), timeout_s=timeout_s)


@given(outputs)
def test_output_comes_out_of_the_stream_as_it_went_in(output):
    assert decode_output("r", encode_output(output)) == output


def test_end_of_a_request_comes_out_with_its_reason_and_measurements():
    output = Output("r", 3, 7, (1, 2), finish_reason=FinishReason.STOP, stop_reason="###", stats={"lane": "shm"})
    text = encode_output(output)
    assert text.startswith("3:7:1 2:{") and "shm" in text
    assert decode_output("r", text) == output


def test_loss_of_an_instance_is_told_in_the_same_stream():
    assert decode_output("r", '4:0::{"lost":"instance d0 lost its lease"}') == Lost(
        "r", 4, "instance d0 lost its lease"
    )


@given(st.text(max_size=200))
def test_text_that_no_instance_writes_is_malformed_or_an_output_never_another_error(text):
    try:
        decode_output("r", text)
    except MalformedOutput as exc:
        assert "output of r" in str(exc)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_body_are_refused_never_another_error(body):
    with pytest.raises(InvalidRequest):
        decode_request(body)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("v", 99, "version 99, this process reads 1"),
        ("prompt", b"\x01\x02\x03", "prompt in a request body"),
        ("prompt", b"", "the prompt has no tokens"),
        ("id", "a b", "request id 'a b' is not usable"),
        ("sampling", {"max_tokens": -1}, "max_tokens is -1: it must be 1 or more"),
        ("sampling", {"max_tokens": "9"}, "max_tokens in a request body is '9'"),
        ("sampling", {"unknown": 1}, "not a map of the known parameters"),
        ("metadata", [1], "metadata in a request body is list, not packed bytes"),
        ("metadata", b"\x91" * 5000, "metadata in a request body is not readable msgpack"),
        ("metadata", b"\x81\xc4\x01a\x01", "not a map with text as keys"),
        ("timeout_s", "soon", "timeout_s in a request body is 'soon'"),
    ],
)
def test_body_with_a_wrong_field_is_refused_by_name(field, value, message):
    raw = msgpack.unpackb(encode_request(Request("r", "m", (1, 2))))
    raw[field] = value
    with pytest.raises(InvalidRequest, match=message):
        decode_request(msgpack.packb(raw))


def test_body_beyond_the_limit_is_refused_on_both_sides():
    with pytest.raises(InvalidRequest, match="shorten its prompt"):
        encode_request(Request("r", "m", tuple([7] * (MAX_BODY_BYTES // 4 + 1))))
    with pytest.raises(InvalidRequest, match="larger than"):
        decode_request(b"\x00" * (MAX_BODY_BYTES + 1))


def test_metadata_that_is_not_made_of_json_values_is_refused_before_it_is_sent():
    with pytest.raises(
        InvalidRequest, match=r"metadata of request r is not made of JSON values: can not serialize 'set'"
    ):
        encode_request(Request("r", "m", (1,), metadata={"ids": {1, 2}}))
    with pytest.raises(InvalidRequest, match="not made of JSON values"):
        encode_request(Request("r", "m", (1,), metadata={"n": 1 << 64}))
