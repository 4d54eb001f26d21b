"""A serving loop that does everything itself: python toy_loop.py [number of prompts]"""

import sys
from dataclasses import dataclass

import numpy as np
from toy_model import BLOCK_SIZE, KV_SHAPE, NUM_BLOCKS, Prompt, ToyModel, prompts


@dataclass
class Sequence:
    request: Prompt
    blocks: list[int]
    tokens: list[int]  # of the prompt, then of the answer


def serve(model: ToyModel, waiting: dict[str, Prompt]) -> None:
    free = list(range(NUM_BLOCKS))
    running: dict[str, Sequence] = {}
    while waiting or running:
        for key, request in list(waiting.items()):
            needed = -(-(len(request.token_ids) + request.max_tokens) // BLOCK_SIZE)
            if needed > len(free):
                break
            del waiting[key]
            blocks = [free.pop() for _ in range(needed)]
            sequence = Sequence(request, blocks, list(request.token_ids))
            sequence.tokens.append(model.forward(sequence.tokens, 0, blocks))
            running[key] = sequence

        for key, sequence in list(running.items()):
            answer = sequence.tokens[len(sequence.request.token_ids) :]
            if len(answer) < sequence.request.max_tokens:
                sequence.tokens.append(model.forward(sequence.tokens[-1:], len(sequence.tokens) - 1, sequence.blocks))
            else:
                free += running.pop(key).blocks
                print(key, *answer)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    serve(ToyModel(np.zeros(KV_SHAPE, np.uint8)), {prompt.name: prompt for prompt in prompts(count)})
