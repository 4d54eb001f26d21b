"""Whether a request can ever run on an engine. Pure."""

from __future__ import annotations

from engine.port import EngineSpec
from splitwise_sched.errors import InvalidRequest
from splitwise_sched.types import Request


def check_request(request: Request, spec: EngineSpec) -> None:
    """Raises InvalidRequest: too long, of other token ids, or with nothing left to compute."""
    sampling = request.sampling
    total = len(request.prompt_token_ids) + sampling.max_tokens
    if total > spec.max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(request.prompt_token_ids)} tokens and max_tokens is {sampling.max_tokens}: "
            f"together {total}, and this engine holds {spec.max_model_len}; shorten the prompt or lower max_tokens",
            param="max_tokens",
        )
    if len(request.emitted_token_ids) >= sampling.max_tokens:
        raise InvalidRequest(
            f"{len(request.emitted_token_ids)} tokens were emitted before and max_tokens is {sampling.max_tokens}: "
            "nothing is left to compute",
            param="max_tokens",
        )
    for token_id in (*request.prompt_token_ids, *request.emitted_token_ids):
        if not 0 <= token_id < spec.vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is not one of this model: they are 0 to {spec.vocab_size - 1}", param="prompt"
            )
