"""Whatever comes from outside is read, or refused in the one way that its reader is ready for (make fuzz: longer)."""

from __future__ import annotations

import os

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette")
pytest.importorskip("tokenizers")
from tests.fuzz.targets import TARGETS

NUM_EXAMPLES = int(os.environ.get("SPLITWISE_FUZZ_EXAMPLES", "60"))
NASTY = (
    b"", b"\x00", b"\xff" * 9, b":::", b"1:0:", b"-1:-1:-1", b"9" * 5000 + b":0:1", b"1:0:99999999999", b"1:0:-3",
    b"1:" + b"9" * 40 + b":1", b'1:0:1:{"logprobs":[[1e999,0]]}', b'1:0:1:{"finish":[]}', b'1:0::{"lost":{}}',
    b"[" * 5000, b'{"a":' * 5000, b'{"model":"m","prompt":' + b"[" * 2000, b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", msgpack.packb({"v": 99}),
    msgpack.packb({"v": 1, "id": "x" * 10_000}), msgpack.packb([[[[[[[[]]]]]]]]), b"nan\n" * 40, "١٢:٣:٤".encode(),
    b'{"first": {"a": 1}, "input_tokens": 3}', b'{"first":"1:0:5","input_tokens":3,"prefill_s":' + b"9" * 400 + b"}",
)  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("data", NASTY, ids=range(len(NASTY)))
def test_what_is_known_to_be_nasty_is_refused_or_read(name, data):
    TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_is_read(name):
    for seed in TARGETS[name].seeds:
        if (name, seed) not in (("endpoints", b"[]"), ("flags", b"\n\nx\n-1")):
            TARGETS[name].run(seed)


@st.composite
def changed(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A seed with some of its bytes replaced, left out, repeated or put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        until = draw(st.integers(at, min(len(data), at + 12)))
        data[at:until] = draw(st.one_of(st.binary(max_size=12), st.just(bytes(data[at:until]) * 3)))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_anything_is_refused_or_read(name):
    target = TARGETS[name]

    @settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(changed(target.seeds), st.binary(max_size=300), st.text(max_size=100).map(str.encode)))
    @example(b"")
    def holds(data: bytes) -> None:
        target(data)

    holds()
