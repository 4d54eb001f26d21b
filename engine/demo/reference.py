"""The same requests through plain ``transformers`` ``generate()``, one at a time: what every token must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.demo.workload import DemoRequest


def generate_reference(
    model_path: Path | str, requests: Sequence[DemoRequest], dtype: str, device: str = "cpu"
) -> Iterator[tuple[int, ...]]:
    """Greedy output token ids of each request in turn, the end token included where it came."""
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    model.eval().to(device)
    with torch.inference_mode():
        for request in requests:
            prompt = torch.tensor([request.prompt_token_ids], device=device)
            output = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=request.max_tokens
            )
            yield tuple(output[0, prompt.shape[1] :].tolist())
