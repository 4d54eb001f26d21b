"""What clients may ask for: the bodies of OpenAI's two completion routes, checked. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from splitwise_sched.errors import InvalidRequest
from splitwise_sched.gateway.errors import ApiError
from splitwise_sched.types import ID_PATTERN, MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams

MAX_MESSAGES = 10_000
_SHOWN_CHARACTERS = 120
# Chat templates do not know the newer name of the system role.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that would change the answer and that no instance honours, with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "prompt_logprobs": (0, False),
    "include_stop_str_in_output": (False,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}


class _Body(BaseModel):
    # Strict: "5" is no number. Unknown fields are those that say nothing about the answer, such as user or metadata.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class StreamOptions(_Body):
    include_usage: bool = False


def _parse_stop(value: Any) -> tuple[str, ...]:
    """One stop string, a list of them, or null."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, list) or len(value) > MAX_STOP_STRINGS:
        what = f"a list of {len(value)}" if isinstance(value, list) else shown(value)
        raise InvalidRequest(f"stop is {what}: it must be text, or at most {MAX_STOP_STRINGS} texts", param="stop")
    for position, stop in enumerate(value):
        if not isinstance(stop, str):
            where = f"stop[{position}]"
            raise InvalidRequest(f"{where} is {shown(stop)}: it must be text", param=where)
    return tuple(value)


class Call(_Body):
    """What both routes have in common."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_parse_stop)] = ()
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    priority: str | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wanted_tokens(self) -> int | None:
        """Output tokens asked for; None when the client left it open."""
        return self.max_tokens

    @property
    def tenant(self) -> str:
        """Who shares the service equally with others: the ``user``; by its hash where that is no id."""
        if not self.user or ID_PATTERN.fullmatch(self.user):
            return self.user or ""
        return hashlib.sha256(self.user.encode()).hexdigest()[:32]

    @property
    def num_logprobs(self) -> int | None:
        """See SamplingParams.logprobs; each route asks for them in its own way."""
        return None

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Raises InvalidRequest naming the field."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            # Some clients write "all" as -1.
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
        )


def _parse_prompt(value: Any) -> str | list[int]:
    """Text or token ids, alone or as the only item of a list. By hand: it may be long, and one complaint is enough."""
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > 1:
            raise InvalidRequest(f"prompt holds {len(value)} prompts: send one a request", param="prompt")
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"prompt is {shown(value)}: it must be text or a list of token ids", param="prompt")
    for position, token_id in enumerate(value):
        if type(token_id) is not int:
            raise InvalidRequest(f"prompt[{position}] is {shown(token_id)}: it must be a token id", param="prompt")
    return value


def _parse_messages(value: Any) -> list[dict[str, str]]:
    """Messages as chat templates know them, with text parts joined."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        what = f"{len(value)} messages" if isinstance(value, list) else shown(value)
        raise InvalidRequest(f"messages is {what}: it must be a list of 1 to {MAX_MESSAGES}", param="messages")
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _parse_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} is {shown(message)}: it must be an object", param=where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(
            f"{where}.role is {shown(role)}: it must be one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    if isinstance(content, list):
        content = "".join(_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidRequest(
            f"{where}.content is {shown(content)}: it must be text, or a list of text parts", param=f"{where}.content"
        )
    if message.get("tool_calls"):
        raise InvalidRequest(f"{where}.tool_calls: this server has no tools; leave it out", param=f"{where}.tool_calls")
    return {"role": _ROLES[role], "content": content}


def _parse_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise InvalidRequest(f"{where} is of type {shown(kind)}: this server takes only text parts", param=where)
    text: str = part["text"]
    return text


class CompletionCall(Call):
    """Body of /v1/completions."""

    prompt: Annotated[str | list[int], PlainValidator(_parse_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class ChatCall(Call):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, str]], PlainValidator(_parse_messages)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


AnyCall = TypeVar("AnyCall", bound=Call)


def parse_call(kind: type[AnyCall], body: bytes) -> AnyCall:
    """
    Raises:
        ApiError: 400, naming the field and its value.
    """
    raw = _parse_json(body)
    for name, neutral in _UNSUPPORTED.items():
        value = raw.get(name)
        if value is not None and value not in neutral:
            raise ApiError(
                400, f"{name} is {shown(value)}: this server does not support it; leave it out",
                param=name, code="unsupported_parameter",
            )  # fmt: skip
    try:
        call = kind.model_validate(raw)
        if raw.get("top_logprobs") and isinstance(call, ChatCall) and not call.logprobs:
            raise InvalidRequest("top_logprobs is given without logprobs: set logprobs to true", param="logprobs")
        wanted = call.wanted_tokens
        if wanted is not None and wanted < 1:
            name = "max_completion_tokens" if raw.get("max_completion_tokens") is not None else "max_tokens"
            raise InvalidRequest(f"{name} is {wanted}: it must be 1 or more", param=name)
        call.sampling(wanted or 1)
    except ValidationError as exc:
        raise _explain(exc) from exc
    except InvalidRequest as exc:
        raise ApiError(400, str(exc), param=exc.param) from exc
    return call


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(body, parse_constant=_refuse_constant)
        # Half a surrogate pair is valid JSON, but no text.
        if b"\\u" in body:
            json.dumps(raw, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise ApiError(400, f"the request body is not valid JSON: {exc}", code="invalid_json") from exc
    if not isinstance(raw, dict):
        kind = type(raw).__name__
        raise ApiError(400, f"the request body is a JSON {kind}: it must be an object", code="invalid_json")
    return raw


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _explain(exc: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    error = exc.errors(include_url=False, include_context=False)[0]
    name, *rest = error["loc"]
    # Further steps are items of lists, members of stream_options, and pydantic's names for the members of unions.
    steps = [
        f"[{s}]" if isinstance(s, int) else f".{s}" for s in rest if isinstance(s, int) or name == "stream_options"
    ]
    param = f"{name}{''.join(steps)}"
    if error["type"] == "missing":
        return ApiError(400, f"{param} is missing: the request must have it", param=param, code="missing_parameter")
    message = str(error["msg"]).removeprefix("Input ")
    return ApiError(400, f"{param} is {shown(error['input'])}: it {message}", param=param)


def shown(value: Any) -> str:
    """``value`` as JSON, for a message: its beginning when it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
