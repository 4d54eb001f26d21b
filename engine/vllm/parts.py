"""What vLLM says of a run, however it was asked, and what becomes of it for the front end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from splitwise_sched.errors import SplitwiseError
from splitwise_sched.types import FinishReason, Output, Request, TokenLogprob

FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class VllmFailed(SplitwiseError):
    """vLLM has ended, or does not come up; what it held goes back to the queue."""


class RunFailed(SplitwiseError):
    """A run that ended without its answer; another try may succeed."""


class RunRefused(SplitwiseError):
    """vLLM's word for a request that it can never run."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is new of a run.

    Attributes:
        logprobs: one a token when asked for, else empty.
        finish_reason: vLLM's word, on the last part.
        num_cached_tokens: of the prompt, not computed here; None: not told.
        transfer: ``kv_transfer_params`` that came with it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int | None = None
    transfer: Mapping[str, Any] | None = None

    @property
    def is_broken_off(self) -> bool:
        """vLLM ended the run, and not because the answer is whole."""
        return self.finish_reason is not None and self.finish_reason not in FINISH


def output_of(
    request: Request, epoch: int, index: int, part: Part, stats: Mapping[str, float | int | str] | None
) -> Output:
    """
    Args:
        index: output position of the part's first token.
        stats: for the part that is the last one.
    """
    finish = None if part.finish_reason is None else FINISH.get(part.finish_reason, FinishReason.ERROR)
    return Output(
        request_id=request.request_id,
        epoch=epoch,
        index=index,
        token_ids=part.token_ids,
        logprobs=part.logprobs,
        finish_reason=finish,
        stop_reason=part.stop_reason if finish is not None else None,
        stats=stats if finish is not None else None,
    )


def first_output(request: Request, output: Output) -> Output:
    """Prefill's token ends its request only when the request wants no more."""
    is_only = request.sampling.max_tokens - len(request.emitted_token_ids) == 1
    if output.finish_reason is FinishReason.LENGTH and not is_only:
        return replace(output, finish_reason=None, stats=None)
    return output
