"""Real prompts of mixed length: questions of the shipped text, and stretches of it from 1 to 1,500 tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from splitwise_sched.tokenizer import Tokenizer

MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 1, 1500
MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS = 8, 64


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """One greedy request.

    Attributes:
        title: what a person reads of the prompt.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    title: str


def make_workload(
    tokenizer: Tokenizer, texts: Sequence[str], questions: Sequence[str], *, count: int, max_len: int, seed: int = 0
) -> list[DemoRequest]:
    """[count] requests; every third is a chat question, the others are stretches of text whose lengths run evenly on a
    logarithmic scale, both ends included.

    Args:
        max_len: of the model, prompt and output together.
    """
    rng = random.Random(seed)
    longest = max(MIN_PROMPT_TOKENS, min(MAX_PROMPT_TOKENS, max_len - MAX_OUTPUT_TOKENS))
    stream = tokenizer.encode("\n\n".join(texts))
    while len(stream) < 2 * longest:
        stream += stream
    num_stretches = count - count // 3
    requests = []
    for i in range(count):
        max_tokens = rng.randint(MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS)
        if i % 3 == 2 and questions:
            question = rng.choice(questions)
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])[:longest]
            title = question
        else:
            step = (i - i // 3) / max(1, num_stretches - 1)
            length = min(longest, round(MIN_PROMPT_TOKENS * (longest / MIN_PROMPT_TOKENS) ** min(1.0, step)))
            start = rng.randrange(len(stream) - length)
            prompt = stream[start : start + length]
            title = "... " + tokenizer.decode(prompt[-12:])
        requests.append(DemoRequest(f"demo-{i:04d}", tuple(prompt), max_tokens, " ".join(title.split())))
    rng.shuffle(requests)
    return requests
