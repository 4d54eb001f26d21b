"""The openai client, unchanged, against a gateway: sync and async, chat and completions, streams and whole answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from tests.conftest import RedisServer
from tests.integration.gateway.parts import MAX_MODEL_LEN, MODEL, ScriptedInstance, gateway
from tests.integration.toy import settings_for

pytest.importorskip("uvicorn")
USER = [{"role": "user", "content": "the fox"}]


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        yield client


async def test_a_chat_is_answered_whole(client: openai.AsyncOpenAI, instance: ScriptedInstance) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=USER, temperature=0, user="somebody")
    choice = answer.choices[0]
    assert choice.message.content == instance.text
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "stop", None)
    request = instance.requests[0]
    assert instance.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False) == (
        "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer.usage is not None
    num_output = len(instance.tokenizer.encode(instance.text)) + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(request.prompt_token_ids), num_output)
    assert answer.usage.total_tokens == len(request.prompt_token_ids) + num_output
    assert answer.object == "chat.completion"
    assert answer.id == request.request_id == answer._request_id


async def test_a_chat_streams_in_the_same_words(client: openai.AsyncOpenAI, instance: ScriptedInstance) -> None:
    instance.text = "größe 🙂 日本語"
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == instance.text
    assert not any("\ufffd" in text for text in texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(instance.tokenizer.encode(instance.text)) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1


async def test_tokens_stream_before_the_answer_has_ended(
    client: openai.AsyncOpenAI, instance: ScriptedInstance
) -> None:
    instance.hold_after = 2
    stream = await client.completions.create(model=MODEL, prompt="the", stream=True)
    first = await anext(stream)
    assert instance.text.startswith(first.choices[0].text)
    assert first.choices[0].text
    instance.go_on.set()
    rest = [chunk async for chunk in stream]
    assert first.choices[0].text + "".join(chunk.choices[0].text for chunk in rest) == instance.text
    assert rest[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("prompt", ["the fox", ["the fox"], [1, 2, 3], [[1, 2, 3]]])
async def test_prompts_are_text_or_token_ids(
    client: openai.AsyncOpenAI, instance: ScriptedInstance, prompt: object
) -> None:
    answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=3)
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    expected = (1, 2, 3) if "fox" not in str(prompt) else tuple(instance.tokenizer.encode("the fox"))
    assert instance.requests[0].prompt_token_ids == expected


def test_the_synchronous_client_works_too(redis_server: RedisServer, topic: str, tokenizer_dir: Path) -> None:
    def talk(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
            assert [model.id for model in client.models.list()] == [MODEL]
            card = client.models.retrieve(MODEL)
            assert card.model_extra == {"max_model_len": MAX_MODEL_LEN}
            whole = client.chat.completions.create(model=MODEL, messages=USER)
            assert whole.choices[0].message.content == "the quick brown fox"
            stream = client.completions.create(model=MODEL, prompt="x", stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == "the quick brown fox"

    async def serve() -> None:
        scheduler = settings_for(redis_server, topic)
        async with ScriptedInstance(scheduler, tokenizer_dir), gateway(scheduler) as url:
            await asyncio.to_thread(talk, url)

    asyncio.run(serve())


async def test_sampling_parameters_reach_the_instance(client: openai.AsyncOpenAI, instance: ScriptedInstance) -> None:
    await client.chat.completions.create(
        model=MODEL, messages=USER, temperature=0.5, top_p=0.9, seed=7, stop=["fox", "dog"], max_completion_tokens=11,
        extra_body={"top_k": 5, "ignore_eos": True, "stop_token_ids": [3]},
    )  # fmt: skip
    sampling = instance.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 5, 7)
    assert (sampling.stop, sampling.stop_token_ids) == (("fox", "dog"), (3,))
    assert (sampling.max_tokens, sampling.ignore_eos) == (11, True)


@pytest.mark.parametrize("honours_stops", [True, False])
@pytest.mark.parametrize("tokens_an_output", [1, 3, 100])
@pytest.mark.parametrize("stream", [True, False])
async def test_stop_strings_are_never_shown(
    client: openai.AsyncOpenAI, instance: ScriptedInstance, honours_stops: bool, tokens_an_output: int, stream: bool
) -> None:
    instance.text = "one two, three. four five"
    instance.honours_stops, instance.tokens_an_output = honours_stops, tokens_an_output
    arguments = {"model": MODEL, "prompt": "x", "stop": ["ee. f", "never"], "logprobs": 1}
    if stream:
        chunks = [c.choices[0] async for c in await client.completions.create(**arguments, stream=True)]
        texts, finish = [c.text for c in chunks], chunks[-1].finish_reason
    else:
        choice = (await client.completions.create(**arguments)).choices[0]
        texts, finish = [choice.text], choice.finish_reason
        assert choice.logprobs is not None
        assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)
    assert "".join(texts) == "one two, thr"
    assert finish == "stop"


async def test_an_answer_that_ends_with_a_beginning_of_a_stop_string_shows_it(
    client: openai.AsyncOpenAI, instance: ScriptedInstance
) -> None:
    instance.text = "one two thr"
    answer = await client.completions.create(model=MODEL, prompt="x", stop="three")
    assert answer.choices[0].text == "one two thr"


async def test_logprobs_of_a_chat_have_their_shape(client: openai.AsyncOpenAI, instance: ScriptedInstance) -> None:
    instance.text = "a 🙂"
    answer = await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(b for token in logprobs.content for b in token.bytes or []).decode() == "a 🙂<|im_end|>"
    assert {token.logprob for token in logprobs.content} == {-0.25}
    assert [len(token.top_logprobs) for token in logprobs.content] == [2] * len(logprobs.content)
    assert logprobs.content[0].top_logprobs[1].logprob == -9999.0


async def test_logprobs_of_a_completion_have_their_shape(
    client: openai.AsyncOpenAI, instance: ScriptedInstance
) -> None:
    instance.text = "the fox 🙂"
    arguments = {"model": MODEL, "prompt": "x", "logprobs": 1, "max_tokens": 40}
    whole = (await client.completions.create(**arguments)).choices[0]
    assert whole.logprobs is not None
    assert len(whole.logprobs.tokens) == len(whole.logprobs.token_logprobs) == len(whole.logprobs.text_offset)
    for token, offset in zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert whole.text[offset : offset + len(token)] == token
    assert whole.logprobs.top_logprobs[0] == {whole.logprobs.tokens[0]: -0.25}
    chunks = [c.choices[0] async for c in await client.completions.create(**arguments, stream=True)]
    streamed = [token for c in chunks if c.logprobs for token in c.logprobs.tokens]
    assert streamed == whole.logprobs.tokens


async def test_token_ids_come_along_when_asked_for(client: openai.AsyncOpenAI, instance: ScriptedInstance) -> None:
    instance.text = "the 🚀"
    expected = instance.tokenizer.encode("the 🚀<|im_end|>")
    arguments = {"model": MODEL, "prompt": "x", "extra_body": {"return_token_ids": True}}
    whole = (await client.completions.create(**arguments)).choices[0]
    assert whole.model_extra == {"token_ids": expected}
    chunks = [c.choices[0] async for c in await client.completions.create(**arguments, stream=True)]
    assert [id_ for c in chunks for id_ in (c.model_extra or {})["token_ids"]] == expected
    plain = [c.choices[0] async for c in await client.completions.create(model=MODEL, prompt="x", stream=True)]
    assert all(c.text for c in plain[:-1])
    assert not any(c.model_extra for c in plain)


async def test_many_streams_at_once_keep_their_words_apart(
    client: openai.AsyncOpenAI, instance: ScriptedInstance
) -> None:
    instance.text = lambda request: f"answer to {request.prompt_token_ids[0]} and no other"

    async def ask(number: int) -> str:
        stream = await client.completions.create(model=MODEL, prompt=[number, 1], stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    answers = await asyncio.gather(*(ask(number) for number in range(3, 67)))
    assert answers == [f"answer to {number} and no other" for number in range(3, 67)]
