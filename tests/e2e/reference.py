"""What plain transformers makes of a request; every path through the system has to give the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from splitwise_sched.types import Request


def generate(path: Path, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Greedy output of ``max_tokens`` tokens for each request, whatever the model's end token is."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.eos_token_id = None
    expected = {}
    with torch.inference_mode():
        for request in requests:
            prompt = torch.tensor([request.prompt_token_ids])
            settings = transformers.GenerationConfig(
                max_new_tokens=request.sampling.max_tokens, do_sample=False, pad_token_id=0
            )
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
            expected[request.request_id] = output[0, prompt.shape[1] :].tolist()
    return expected
