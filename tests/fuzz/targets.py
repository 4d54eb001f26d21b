"""What reads bytes from outside: each must give a value, or the one kind of error that its caller expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from engine.handover import Handover, MalformedHandover
from engine.llama_cpp.blob import HEADER_BYTES, Unsealed, beginning, seal, unseal
from engine.vllm.completions import Events, message_of, part_of, payload_of
from engine.vllm.facts import figures_of, served_models_of, version_of
from engine.vllm.parts import RunFailed, output_of
from kv_transfer.endpoint import endpoints_from_text
from kv_transfer.errors import KVTransferError
from kv_transfer.transports.rdma import orders, wire
from splitwise_sched.assembly import Assembly
from splitwise_sched.codec import decode_request, encode_request
from splitwise_sched.configuration import load
from splitwise_sched.errors import ConfigError, InvalidRequest
from splitwise_sched.gateway.calls import ChatCall, CompletionCall, parse_call
from splitwise_sched.gateway.errors import ApiError
from splitwise_sched.gateway.settings import GatewaySettings
from splitwise_sched.outputs import Lost, MalformedOutput, decode_output, decode_outputs, encode_output
from splitwise_sched.records import InstanceRecord
from splitwise_sched.setting_fields import setting_fields
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import FinishReason, Output, Request, SamplingParams, TokenLogprob, check_id

REQUEST = Request(
    "r-1",
    "toy",
    (1, 2, 3),
    SamplingParams(max_tokens=5, stop=("a",), seed=7),
    (4,),
    3.5,
    {"k": [1, None]},
    "batch",
    "t",
)
OUTPUT = Output(
    "r-1", 3, 4, (7, 8), (TokenLogprob(7, -0.5, ((7, -0.5), (9, -1.5))),), FinishReason.STOP, "a", "why", {"lane": "x"}
)


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        errors: what it may raise; all else is a find.
        seeds: inputs that it reads well, to begin from.
    """

    run: Callable[[bytes], object]
    errors: tuple[type[Exception], ...] = ()
    seeds: tuple[bytes, ...] = ()

    def __call__(self, data: bytes) -> None:
        try:
            self.run(data)
        except self.errors as exc:
            assert str(exc), "an error that says nothing"
            assert len(str(exc)) < 20_000, "an error that repeats all that it got"


def body(data: bytes) -> None:
    # Not the requests: metadata may have a NaN, which equals nothing.
    encoded = encode_request(decode_request(data))
    assert encode_request(decode_request(encoded)) == encoded


def request_id(data: bytes) -> None:
    name = check_id("request", data.decode(errors="surrogateescape"))
    assert name.isascii() and 1 <= len(name) <= 128 and not set(name) & set("{}* \n\r")


def output(data: bytes) -> None:
    read = decode_output("r-1", data.decode(errors="replace"))
    if isinstance(read, Output):
        assert decode_output("r-1", encode_output(read)).epoch == read.epoch


def outputs(data: bytes) -> None:
    """As a front end takes them: what it then has of a request can be put back."""
    assembly = Assembly()
    for read in decode_outputs("r-1", data.decode(errors="replace").split("\n")):
        if isinstance(read, Lost):
            assembly.raise_epoch(read.epoch)
        else:
            for given in assembly.feed(read):
                assert given.epoch == assembly.epoch
    encode_request(replace(REQUEST, emitted_token_ids=tuple(assembly.token_ids)))


def record(data: bytes) -> None:
    pairs = [line.partition("=") for line in data.decode(errors="replace").split("\n")]
    fields = {name: value for name, _, value in pairs}
    known = InstanceRecord.from_fields("p-1", fields)
    if known is not None:
        assert check_id("instance", known.name) and known.tokenizer is not None


def flags(data: bytes) -> None:
    names = [field.name for settings in (SchedulerSettings, GatewaySettings) for field in setting_fields(settings)]
    values = data.decode(errors="replace").split("\n")
    load([SchedulerSettings, GatewaySettings], flags=dict(zip(names, values, strict=False)), environ={})


def rdma_request(data: bytes) -> None:
    """As a source reads it off a connection, head by head."""
    token, head = wire.unpack_preface(_cut(data, 0, wire.PREFACE_BYTES)), _cut(data, wire.PREFACE_BYTES, _HEAD_END)
    rest = _cut(data, _HEAD_END, _HEAD_END + wire.request_rest_bytes(head))
    request = wire.unpack_request(head, rest)
    assert len(wire.pack_request(token, request)) == _HEAD_END + len(rest)


def rdma_order(data: bytes) -> None:
    head = _cut(data, 0, orders.HEAD_BYTES)
    ids = _cut(data, orders.HEAD_BYTES, orders.HEAD_BYTES + orders.ids_bytes(head))
    number, lane, order = orders.unpack_order(head, ids)
    assert orders.pack_order(number, lane, order) == head + ids


def _cut(data: bytes, begin: int, end: int) -> bytes:
    if len(data) < end:
        raise EOFError("the connection has ended")
    return data[begin:end]


_HEAD_END = wire.PREFACE_BYTES + wire.REQUEST_HEAD_BYTES
_PORT = wire.PortAddress(bytes(16), 0, 5, 16, True)
_IDS = np.arange(3)


def llama_cpp_pieces(data: bytes) -> None:
    """As decode opens what lies in its blocks, piece after piece."""
    blocks, done = np.frombuffer(data, np.uint8), beginning("m")
    while done.num_tokens < len(_INPUT):
        state, done = unseal(blocks, done, _INPUT)
        blocks = blocks[HEADER_BYTES + state.nbytes :]


def _pieces() -> bytes:
    first = beginning("m").after(_INPUT[:2])
    headers = seal(_STATE, beginning("m"), first), seal(_STATE, first, first.after(_INPUT[2:]))
    return b"".join(header + _STATE.tobytes() for header in headers)


_INPUT, _STATE = (5, 6, 7), np.arange(20, dtype=np.uint8)


def vllm_stream(data: bytes) -> None:
    """As the agent beside a ``vllm serve`` reads a completion."""
    left = 9
    for event in Events().feed(data):
        part = part_of(payload_of(event), has_logprobs=True, limit=left)
        if part is not None:
            assert all(0 <= t < 1 << 31 for t in part.token_ids)
            assert len(part.logprobs) == len(part.token_ids) <= left
            left -= len(part.token_ids)
            output = output_of(REQUEST, 1, 0, part, None)
            if not part.is_broken_off:
                assert decode_output("r-1", encode_output(output)) == output


def vllm_facts(data: bytes) -> None:
    version_of(data)
    message_of(data)
    assert all(1 <= model.max_model_len < 1 << 31 for model in served_models_of(data).values())
    figures_of(data)


TARGETS: dict[str, Target] = {
    "body": Target(body, (InvalidRequest,), (encode_request(REQUEST),)),
    "request_id": Target(request_id, (InvalidRequest,), (b"a-b:1",)),
    "output": Target(output, (MalformedOutput,), (encode_output(OUTPUT).encode(), b'2:0::{"lost":"why"}', b"1:0:5 6")),
    "outputs": Target(outputs, (), (b"1:0:5 6\n1:2:7\n1:9:8\n" + encode_output(OUTPUT).encode(),)),
    "record": Target(
        record,
        (),
        (
            b"role=mixed\nmodel=m\nmax_model_len=9\ncapacity_tokens=4\nreserved_tokens=0\nname=x",
            b"role=mixed\nmodel=m\nmax_model_len=9\ncapacity_tokens=4\nreserved_tokens=0\nname=",
        ),
    ),
    "endpoints": Target(lambda data: endpoints_from_text(data.decode(errors="replace")), (KVTransferError,), (b"[]",)),
    "handover": Target(
        lambda data: Handover.decode(data, "k", "r-1", 3),
        (MalformedHandover,),
        (b'{"first": "1:0:5", "input_tokens": 3, "prefill_s": 0.5}',),
    ),
    "llama_cpp_pieces": Target(llama_cpp_pieces, (Unsealed,), (_pieces(),)),
    "completion": Target(
        lambda data: parse_call(CompletionCall, data),
        (ApiError,),
        (b'{"model": "m", "prompt": [1, 2], "stop": ["a"], "logprobs": 2, "stream": true}',),
    ),
    "chat": Target(
        lambda data: parse_call(ChatCall, data),
        (ApiError,),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}',),
    ),
    "rdma_request": Target(
        rdma_request,
        (wire.BadHandshake, wire.OtherVersion, EOFError),
        (
            wire.pack_request(bytes(16), wire.Request(_PORT, wire.MODE_READ, 0, [wire.PairAddress(1, 2)], [])),
            wire.pack_request(
                bytes(16),
                wire.Request(_PORT, wire.MODE_WRITE, 4, [wire.PairAddress(1, 2)] * 2, [wire.RemoteRegion(9, 8, 7)]),
            ),
        ),
    ),
    "rdma_order": Target(
        rdma_order,
        (orders.BadOrder, EOFError),
        (
            orders.pack_order(1, 0, orders.Order(bytes(16), _IDS, _IDS)),
            orders.pack_order(2, 1, orders.Order(bytes(16), _IDS, None, 1, 4096)),
        ),
    ),
    "vllm_stream": Target(
        vllm_stream,
        (RunFailed,),
        (
            b'data: {"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [-0.5], "top_logprobs": '
            b'[{"token_id:5": -0.5, "token_id:6": -1}]}, "finish_reason": "stop", "stop_reason": "x"}]}\n\n',
            b'data: {"choices": [{"token_ids": [], "stop_reason": "x"}]}\n\n',
        ),
    ),
    "vllm_facts": Target(
        vllm_facts,
        (),
        (
            b'{"version": "0.32.0"}',
            b'{"data": [{"id": "m", "root": "/m", "max_model_len": 9}]}',
            b'vllm:num_requests_running{engine="0",model_name="m"} 3.0\nvllm:kv_cache_usage_perc{engine="1"} 0.5\n',
            b'{"error": {"message": "no", "code": 400}}',
        ),
    ),
    "flags": Target(flags, (ConfigError,), (b"localhost\n6379\n0\nme", b"\n\nx\n-1")),
}
