"""Their requests and results as this scheduler's, and back. Pure."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from splitwise_sched.errors import InvalidRequest
from splitwise_sched.fastdeploy.ids import run_name, safe_id
from splitwise_sched.fastdeploy.plain import plain_dict
from splitwise_sched.types import FinishReason, Output, Request, SamplingParams

METADATA_KEY = "fastdeploy"
OK, FAILED = 200, 500
MAX_RESULT_CHARS = 1 << 20


@dataclass(eq=False)
class Run:
    """One run of a request on this instance.

    Attributes:
        name: the request id that the engine sees.
        data: for the request class's ``from_dict``.
        num_emitted: output tokens that the user had before this run.
        starts_here: this instance computes the run's first token.
        next_index: output position of its next token; None until the engine told of one.
        told_at: monotonic time at which the engine, or the scheduler, last told of it.
        is_handed_over: prefill is through; what follows comes from decode.
    """

    name: str
    request_id: str
    epoch: int
    data: dict[str, Any]
    num_input_tokens: int
    num_emitted: int
    max_tokens: int
    starts_here: bool
    next_index: int | None = None
    told_at: float = field(default_factory=time.monotonic)
    is_handed_over: bool = False

    @property
    def is_new(self) -> bool:
        return self.next_index is None


def request_of(theirs: Any, *, model: str, max_model_len: int | None, ttl_s: float) -> Request:
    """Their request, as it is submitted. Everything that it says travels along.

    Raises:
        InvalidRequest: its id or prompt is not usable, or something in it is no JSON value.
    """
    user_id = theirs.request_id
    request_id = safe_id(user_id)
    data = plain_dict(theirs, f"request {user_id[:80]!r}")
    prompt = data.pop("prompt_token_ids", None)
    if not isinstance(prompt, list) or not prompt or not all(isinstance(t, int) for t in prompt):
        raise InvalidRequest(
            f"request {user_id[:80]!r} has no prompt_token_ids: give a list of token ids", param="prompt"
        )
    room = None if max_model_len is None else max(1, max_model_len - len(prompt))
    max_tokens = data.get("max_tokens")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        max_tokens = SamplingParams().max_tokens if room is None else room
    return Request(
        request_id=request_id,
        model=model,
        prompt_token_ids=tuple(prompt),
        # The engine goes by its own parameters in ``data``; this one is what KV is reserved by.
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        timeout_s=ttl_s,
        metadata={METADATA_KEY: {**data, "request_id": user_id}},
    )


def run_of(request: Request, epoch: int, *, starts_here: bool, info: dict[str, Any] | None) -> Run:
    """A run of ``request``, which came over Redis.

    A re-run is told by its input: what the user already has stands at the end of the prompt, and is taken off the
    number of tokens to make.

    Args:
        info: the request's ``disaggregate_info``.

    Raises:
        InvalidRequest: the request's metadata are not what ``request_of`` writes.
    """
    data = request.metadata.get(METADATA_KEY)
    if data is None:
        data = _foreign(request)
    if not isinstance(data, dict) or not isinstance(data.get("request_id"), str):
        raise InvalidRequest(f"metadata of request {request.request_id} has no {METADATA_KEY} map with a request_id")
    num_emitted = len(request.emitted_token_ids)
    name = run_name(data["request_id"], epoch)
    data = {**data, "request_id": name, "disaggregate_info": info}
    data["prompt_token_ids"] = [*request.prompt_token_ids, *request.emitted_token_ids]
    data["prompt_token_ids_len"] = len(data["prompt_token_ids"])
    if num_emitted:
        for limit, least in (("max_tokens", 1), ("min_tokens", 0)):
            if isinstance(data.get(limit), int):
                data[limit] = max(least, data[limit] - num_emitted)
    return Run(
        name=name,
        request_id=request.request_id,
        epoch=epoch,
        data=data,
        num_input_tokens=request.num_input_tokens,
        num_emitted=num_emitted,
        max_tokens=request.sampling.max_tokens,
        starts_here=starts_here,
    )


def _foreign(request: Request) -> dict[str, Any]:
    """What is known of a request that another program submitted, such as the gateway."""
    sampling = asdict(request.sampling)
    sampling["stop"] = list(sampling["stop"])
    sampling["stop_token_ids"] = list(sampling["stop_token_ids"])
    return {**sampling, "request_id": request.request_id, "prompt": None, "arrival_time": time.time()}


def output_of(run: Run, theirs: Any, *, is_prefill: bool) -> Output:
    """Their result of ``run``, whose position moves on.

    Prefill's first token does not finish a request, whatever the engine says: it has finished with it, decode has not.

    Raises:
        InvalidRequest: the result has parts that are no JSON values, or is larger than MAX_RESULT_CHARS allows.
    """
    where = f"result of {run.name[:80]!r}"
    result = plain_dict(theirs, where)
    result.pop("request_id", None)
    outputs = result.get("outputs")
    tokens, send_idx = _taken(outputs, where)
    if run.next_index is None:
        first_here = 0 if run.starts_here else 1 if send_idx is None else send_idx
        run.next_index = run.num_emitted + first_here
    index = run.next_index
    run.next_index += len(tokens)
    if isinstance(outputs, dict) and send_idx is not None:
        outputs["send_idx"] = send_idx + run.num_emitted
    code = result.get("error_code")
    if (size := len(json.dumps(result))) > MAX_RESULT_CHARS:
        raise InvalidRequest(f"{where} takes {size} characters, more than {MAX_RESULT_CHARS}: leave out what is long")
    is_failed = code not in (None, OK)
    is_finished = bool(result.pop("finished", False)) and not (is_prefill and index == run.num_emitted)
    reason = None
    if is_failed:
        reason = FinishReason.ERROR
    elif is_finished:
        reason = FinishReason.LENGTH if run.next_index >= run.max_tokens else FinishReason.STOP
    return Output(
        request_id=run.request_id,
        epoch=run.epoch,
        index=index,
        token_ids=tokens,
        finish_reason=reason,
        detail=str(result.get("error_msg") or f"its engine told error {code}") if is_failed else None,
        extra=result,
    )


def _taken(outputs: Any, where: str) -> tuple[tuple[int, ...], int | None]:
    """Token ids and ``send_idx`` of a result; the token ids are taken out, they travel by themselves."""
    if not isinstance(outputs, dict):
        return (), None
    tokens = outputs.pop("token_ids", None) or []
    if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens):
        raise InvalidRequest(f"{where} has outputs.token_ids {str(tokens)[:80]}: it must be a list of token ids")
    send_idx = outputs.get("send_idx")
    return tuple(tokens), send_idx if isinstance(send_idx, int) and send_idx >= 0 else None


def result_dict(user_id: str, output: Output) -> dict[str, Any]:
    """For the output class's ``from_dict``: what the engine put in, with the tokens that the user does not have yet."""
    if output.extra is None:
        outputs: Any = {"index": 0, "send_idx": output.index}
        result = _skeleton(user_id)
    else:
        result = dict(output.extra)
        outputs = result.get("outputs")
    if isinstance(outputs, dict):
        result["outputs"] = {**outputs, "token_ids": list(output.token_ids)}
    finished = output.finish_reason is not None
    result.update(request_id=user_id, finished=finished)
    if output.finish_reason is FinishReason.CANCELLED:
        result.update(error_code=FAILED, error_msg=output.detail or "cancelled")
    return result


def error_dict(user_id: str, message: str, extra: Any = None) -> dict[str, Any]:
    """The same for a request that ended without its answer; ``extra`` is its engine's result, when there is one."""
    result = _skeleton(user_id)
    if isinstance(extra, dict):
        result.update({name: value for name, value in extra.items() if value is not None and name != "outputs"})
    code = result.get("error_code")
    result.update(
        request_id=user_id,
        finished=True,
        error_code=code if isinstance(code, int) and code != OK else FAILED,
        error_msg=message,
    )
    return result


def _skeleton(user_id: str) -> dict[str, Any]:
    return {
        "request_id": user_id,
        "prompt": "",
        "prompt_token_ids": [],
        "outputs": {"index": -1, "send_idx": -1, "token_ids": []},
        "finished": False,
        "metrics": {"arrival_time": time.time()},
        "num_cached_tokens": 0,
        "error_code": OK,
        "error_msg": None,
    }
