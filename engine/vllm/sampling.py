"""Our requests as vLLM's, and vLLM's outputs as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm import SamplingParams as VllmSamplingParams
from vllm.sampling_params import RequestOutputKind

from engine.vllm.parts import Part
from splitwise_sched.types import Request, TokenLogprob


def sampling_of(request: Request, max_tokens: int, transfer: Mapping[str, Any] | None) -> VllmSamplingParams:
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
        # vLLM's connector writes into it.
        extra_args=None if transfer is None else {"kv_transfer_params": dict(transfer)},
    )


def part_of(result: Any) -> Part:
    """
    Args:
        result: vLLM's RequestOutput, with what is new in it.
    """
    part = result.outputs[0]
    return Part(
        token_ids=tuple(part.token_ids),
        logprobs=tuple(map(_logprob, part.token_ids, part.logprobs)) if part.logprobs else (),
        finish_reason=part.finish_reason,
        stop_reason=part.stop_reason,
        num_cached_tokens=result.num_cached_tokens or 0,
        transfer=result.kv_transfer_params,
    )


def _logprob(token_id: int, found: Any) -> TokenLogprob:
    """vLLM gives the chosen token and the most likely ones in one mapping."""
    ranked = sorted(found.items(), key=lambda item: item[1].rank or 0)
    top = tuple((other, float(entry.logprob)) for other, entry in ranked)
    return TokenLogprob(token_id, float(found[token_id].logprob), top)
