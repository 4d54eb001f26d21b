"""Our requests as vLLM's, and vLLM's outputs as ours."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams as VllmSamplingParams
from vllm.sampling_params import RequestOutputKind

from splitwise_sched.types import FinishReason, Output, Request, TokenLogprob

FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


def sampling_of(request: Request, max_tokens: int, transfer: dict[str, Any] | None) -> VllmSamplingParams:
    """
    Args:
        max_tokens: of this run.
        transfer: ``kv_transfer_params``.
    """
    s = request.sampling
    return VllmSamplingParams(
        max_tokens=max_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k or -1,
        seed=s.seed,
        stop=list(s.stop),
        stop_token_ids=list(s.stop_token_ids),
        ignore_eos=s.ignore_eos,
        logprobs=s.logprobs,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if transfer is None else {"kv_transfer_params": transfer},
    )


def output_of(request: Request, epoch: int, index: int, part: Any, stats: dict[str, Any] | None) -> Output:
    """
    Args:
        part: vLLM's CompletionOutput, with what is new in it.
        index: output position of its first token.
    """
    finish = FINISH.get(part.finish_reason, FinishReason.ERROR) if part.finish_reason is not None else None
    return Output(
        request_id=request.request_id,
        epoch=epoch,
        index=index,
        token_ids=tuple(part.token_ids),
        logprobs=tuple(map(_logprob, part.token_ids, part.logprobs)) if part.logprobs else (),
        finish_reason=finish,
        stop_reason=part.stop_reason,
        stats=stats if finish is not None else None,
    )


def _logprob(token_id: int, found: Any) -> TokenLogprob:
    """vLLM gives the chosen token and the most likely ones in one mapping."""
    ranked = sorted(found.items(), key=lambda item: item[1].rank or 0)
    top = tuple((other, float(entry.logprob)) for other, entry in ranked)
    return TokenLogprob(token_id, float(found[token_id].logprob), top)
