"""The Redis protocol by hand says what hiredis says, for replies of both versions that come in any pieces."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_sched.resp import (
    NOT_YET,
    ProtocolError,
    Push,
    PythonReader,
    ReplyError,
    is_push,
    new_reader,
    pack,
    pack_in_python,
)

hiredis = pytest.importorskip("hiredis")

texts = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)
leaves = st.one_of(
    texts.map(lambda t: b"+%b\r\n" % t.encode()),
    texts.map(lambda t: b"-ERR %b\r\n" % t.encode()),
    st.integers(-(2**63), 2**63 - 1).map(lambda n: b":%d\r\n" % n),
    st.binary(max_size=40).map(lambda b: b"$%d\r\n%b\r\n" % (len(b), b)),
    st.sampled_from([b"$-1\r\n", b"*-1\r\n", b"_\r\n", b"#t\r\n", b"#f\r\n", b",1.5\r\n", b"=7\r\ntxt:abc\r\n"]),
)


def array_of(items: list[bytes]) -> bytes:
    return b"*%d\r\n" % len(items) + b"".join(items)


def map_of(items: list[bytes]) -> bytes:
    return b"%%%d\r\n" % len(items) + b"".join(b"+key %d\r\n%b" % (i, item) for i, item in enumerate(items))


replies = st.recursive(
    leaves, lambda inner: st.one_of(*(st.lists(inner, max_size=4).map(f) for f in (array_of, map_of))), max_leaves=12
)


def plain(reply):
    """Errors compare by text, and both kinds of reader have one of their own kind of push."""
    if isinstance(reply, Exception):
        return ("error", str(reply))
    if isinstance(reply, dict):
        return {key: plain(value) for key, value in reply.items()}
    return [plain(item) for item in reply] if isinstance(reply, list) else reply


def all_of(reader, pieces, decode):
    found = []
    for piece in pieces:
        reader.feed(piece)
        while (reply := reader.gets(decode)) is not NOT_YET:
            found.append(plain(reply))
    return found


@given(st.lists(replies, min_size=1, max_size=4), st.data(), st.booleans())
def test_replies_in_any_pieces_are_what_hiredis_reads(packed, data, decode):
    stream = b"".join(packed)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    bounds = [0, *cuts, len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    assert isinstance(new_reader(), hiredis.Reader)
    assert all_of(PythonReader(), pieces, decode) == all_of(new_reader(), pieces, decode)


@given(st.lists(st.one_of(texts, st.binary(max_size=20), st.integers(), st.floats(allow_nan=False)), min_size=1))
def test_commands_are_packed_as_hiredis_packs_them(args):
    args = [a for a in args if not isinstance(a, float) or math.isfinite(a)]
    by_hand, packed = pack_in_python(("SET", *args)), pack(("SET", *args))
    assert all_of(PythonReader(), [by_hand], False)[0][0] == b"SET"
    if not any(isinstance(a, float) for a in args):
        assert by_hand == packed


@pytest.mark.parametrize("how", [pack, pack_in_python])
def test_an_argument_that_is_no_text_bytes_or_number_is_refused(how):
    with pytest.raises(TypeError):
        how(("SET", "key", None))


def test_an_error_reply_says_its_code():
    reader = PythonReader()
    reader.feed(b"-NOSCRIPT No matching script.\r\n")
    reply = reader.gets()
    assert isinstance(reply, ReplyError)
    assert reply.code == "NOSCRIPT"


@pytest.mark.parametrize("make", [PythonReader, new_reader])
def test_a_push_is_told_from_replies(make):
    reader = make()
    reader.feed(b">2\r\n+message\r\n:1\r\n*1\r\n:2\r\n")
    assert is_push(reader.gets())
    assert not is_push(reader.gets())
    assert is_push(Push())


@pytest.mark.parametrize("make", [PythonReader, new_reader])
@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n", b"$abc\r\n", b":\r\n"])
def test_what_is_no_redis_protocol_is_refused(make, garbage):
    reader = make()
    reader.feed(garbage)
    with pytest.raises(ProtocolError):
        reader.gets()


def test_a_reply_that_nests_without_end_is_refused_by_hand():
    reader = PythonReader()
    reader.feed(b"*1\r\n" * 1000)
    with pytest.raises(ProtocolError, match="nested"):
        reader.gets()
