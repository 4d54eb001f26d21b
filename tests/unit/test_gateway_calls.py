"""Which request bodies are calls, and which are refused, by the name of the field."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_sched.gateway.calls import ChatCall, CompletionCall, parse_call
from splitwise_sched.gateway.errors import ApiError

MESSAGES = [{"role": "user", "content": "x"}]


def completion(**fields: Any) -> CompletionCall:
    return parse_call(CompletionCall, json.dumps({"model": "m", "prompt": "x", **fields}).encode())


def chat(**fields: Any) -> ChatCall:
    return parse_call(ChatCall, json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": None}, "model", "string"),
        ({"prompt": None}, "prompt", "null"),
        ({"prompt": 3}, "prompt", "must be text or a list"),
        ({"prompt": ["a", "b"]}, "prompt", "2 prompts"),
        ({"prompt": [[1], [2]]}, "prompt", "2 prompts"),
        ({"prompt": [1, "a"]}, "prompt", 'prompt[1] is "a"'),
        ({"prompt": [1, True]}, "prompt", "prompt[1] is true"),
        ({"prompt": [1, 2.5]}, "prompt", "prompt[1] is 2.5"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": -2}, "top_k", "0 (all) or more"),
        ({"seed": 2**63}, "seed", "64-bit"),
        ({"stop": 5}, "stop", "stop is 5"),
        ({"stop": [""]}, "stop", "1 to 1024 characters"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": ["a", 5]}, "stop[1]", "stop[1] is 5"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"n": 2}, "n", "n is 2"),
        ({"best_of": 3}, "best_of", "best_of is 3"),
        ({"echo": True}, "echo", "does not support"),
        ({"suffix": "end"}, "suffix", "does not support"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "does not support"),
        ({"presence_penalty": 0.5}, "presence_penalty", "does not support"),
    ],
)
def test_a_completion_that_cannot_be_done_is_refused_by_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "0 messages"),
        ({"messages": "hello"}, "messages", '"hello"'),
        ({"messages": ["hello"]}, "messages[0]", "object"),
        ({"messages": [*MESSAGES, {"content": "x"}]}, "messages[1].role", "null"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", '"king"'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", '"tool"'),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", '"image_url"'),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content[0]", "text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls", "tools"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
        ({"top_logprobs": 3}, "logprobs", "set logprobs to true"),
        ({"logprobs": 1}, "logprobs", "boolean"),
        ({"tools": [{"type": "function"}]}, "tools", "does not support"),
        ({"tool_choice": "required"}, "tool_choice", "does not support"),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"n": 0}, "n", "n is 0"),
    ],
)
def test_a_chat_that_cannot_be_done_is_refused_by_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


@pytest.mark.parametrize("name", ["model", "prompt"])
def test_a_missing_field_is_named(name: str) -> None:
    body = {"model": "m", "prompt": "x"}
    del body[name]
    with pytest.raises(ApiError, match=f"{name} is missing") as caught:
        parse_call(CompletionCall, json.dumps(body).encode())
    assert caught.value.param == name


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(ApiError, match="surrogates") as caught:
        parse_call(CompletionCall, b'{"model": "m", "prompt": "\\ud83d"}')
    assert caught.value.status == 400
    assert parse_call(CompletionCall, b'{"model": "m", "prompt": "\\ud83d\\ude42"}').prompt == "🙂"


def test_what_asks_for_nothing_is_let_pass() -> None:
    call = chat(
        n=1, tools=[], tool_choice="auto", response_format={"type": "text"}, frequency_penalty=0.0, presence_penalty=0,
        logit_bias=None, user="u", metadata={"a": "b"}, store=True, service_tier="auto", something_new=[1],
        parallel_tool_calls=True, stream_options=None, stop=None, seed=None, temperature=None, max_tokens=None,
    )  # fmt: skip
    assert call.wanted_tokens is None
    assert call.sampling(4).temperature == 1.0
    assert completion(echo=False, best_of=1, suffix=None, top_k=-1).sampling(1).top_k == 0


def test_messages_are_what_chat_templates_know() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    call = chat(messages=[{"role": "developer", "content": parts}, {"role": "user", "content": "x", "name": "Ann"}])
    assert call.messages == [{"role": "system", "content": "one two"}, {"role": "user", "content": "x"}]


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).wanted_tokens == 7


def test_logprobs_mean_different_things_in_the_two_routes() -> None:
    assert chat(logprobs=True, top_logprobs=4).num_logprobs == 4
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=False).num_logprobs is None
    assert completion(logprobs=0).num_logprobs == 0
    assert completion().num_logprobs is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["model", "prompt", "messages", "stop", "stream_options", "max_tokens", "seed", "tools", "logprobs", "temperature"]
)


@given(body=st.dictionaries(FIELDS, JSON))
def test_any_json_is_a_call_or_an_error_for_its_user(body: dict[str, Any]) -> None:
    for kind in (CompletionCall, ChatCall):
        try:
            parse_call(kind, json.dumps({"model": "m", **body}).encode())
        except ApiError as exc:
            assert exc.status == 400
            assert exc.message


@pytest.mark.parametrize(
    ("user", "tenant"),
    [(None, ""), ("", ""), ("team-a", "team-a"), ("a@b.example", hashlib.sha256(b"a@b.example").hexdigest()[:32])],
)
def test_user_is_the_tenant_and_goes_by_its_hash_where_it_is_no_id(user, tenant):
    body = json.dumps({"model": "m", "prompt": "x", "user": user, "priority": "batch"}).encode()
    call = parse_call(CompletionCall, body)
    assert (call.tenant, call.priority) == (tenant, "batch")
