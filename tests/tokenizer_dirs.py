"""Tokenizers made on the spot, and model directories that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "größe naïve café – “quotes” … 日本語のテキスト 🙂🙃 🏳️‍🌈",
    "def f(x):\n    return x + 1\n",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """Every byte has a token; <|endoftext|>, <|im_start|> and <|im_end|> are special."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    backend.add_tokens(["<mask me>"])
    return backend


def saved(folder: Path, backend: tokenizers.Tokenizer, **config: object) -> Path:
    """``folder``, with the tokenizer's files in it; ``config`` is tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
