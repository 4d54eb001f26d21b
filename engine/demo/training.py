"""Trains the demo model's tokenizer and weights, in less than a minute on two CPU cores."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.demo.corpus import Corpus, Dialogue, as_messages
from engine.demo.muon import Muon

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        num_steps: on a machine that is quick enough, exactly so many, and the result is always the same.
            On two quiet cores they take about 45 s.
        limit_s: on a slower or busier one every phase becomes shorter, so that training ends by then.
        grace_s: for the first, slow steps: the clock does not count before.
        single_part: part of the steps that sees one question at a time only; later, one step in ``long_every`` sees a
            long row of many, so that long prompts are nothing new.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    max_position_embeddings: int = 4096
    num_steps: int = 580
    limit_s: float = 150.0
    grace_s: float = 5.0
    single_part: float = 0.35
    long_every: int = 3
    batch_size: int = 12
    long_lengths: tuple[int, ...] = (512, 1024, 2048)
    embedding_lr: float = 6e-3
    matrix_lr: float = 0.02
    seed: int = 20


def train_tokenizer(corpus: Corpus, recipe: Recipe) -> tokenizers.Tokenizer:
    """Byte-level BPE, so that every text has tokens; the special tokens have the ids 0, 1 and 2."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.texts(), trainer)
    return tokenizer


def train_model(
    corpus: Corpus, tokenizer: tokenizers.Tokenizer, recipe: Recipe, on_progress: Callable[[float], None]
) -> LlamaForCausalLM:
    """
    Args:
        on_progress: called after each step with the part that is done, up to 1.
    """
    torch.manual_seed(recipe.seed)
    model = _new_model(recipe, tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=recipe.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0),
        Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.05),
    ]
    batches = _Batches(corpus, tokenizer, recipe)
    threads = _Threads()
    started = time.monotonic()
    for step in range(recipe.num_steps):
        overtime = (time.monotonic() - started - recipe.grace_s) / (recipe.limit_s - recipe.grace_s)
        part = max(step / recipe.num_steps, overtime)
        if part >= 1:
            break
        is_long = part >= recipe.single_part and step % recipe.long_every == 0
        tokens, labels = batches.long() if is_long else batches.single()
        threads.before_step()
        model(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in zip(optimizers, (recipe.embedding_lr, recipe.matrix_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * _warm_up_and_decay(step, part)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        threads.after_step(tokens.numel())
        on_progress(min(1.0, max((step + 1) / recipe.num_steps, overtime)))
    model.train(False)
    return model


def _new_model(recipe: Recipe, tokenizer: tokenizers.Tokenizer) -> LlamaForCausalLM:
    end_of_text, turn_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 5 // 2,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=turn_end,
        pad_token_id=end_of_text,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [turn_end, end_of_text]
    return model


def _warm_up_and_decay(step: int, part: float) -> float:
    return min(1.0, (step + 1) / 15) * min(1.0, max(0.02, (1 - part) / 0.7))


class _Threads:
    """Two threads while that is quick; one for a while when another program takes the cores.

    Two that wait for each other at every operation are then slower than one, many times over.
    """

    def __init__(self) -> None:
        self._fastest_s = float("inf")
        self._single_steps_left = 0
        self._started = 0.0

    def before_step(self) -> None:
        torch.set_num_threads(1 if self._single_steps_left > 0 else 2)
        self._single_steps_left -= 1
        self._started = time.monotonic()

    def after_step(self, num_tokens: int) -> None:
        token_s = (time.monotonic() - self._started) / num_tokens
        self._fastest_s = min(self._fastest_s, token_s)
        if self._single_steps_left <= 0 and token_s > 4 * self._fastest_s:
            self._single_steps_left = 16


class _Batches:
    """Rows of tokens for training, drawn without end."""

    def __init__(self, corpus: Corpus, tokenizer: tokenizers.Tokenizer, recipe: Recipe) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._rng = random.Random(recipe.seed)
        self._documents = self._in_turn()
        self._pool: list[list[list[int]]] = []
        self._row: list[int] = []

    def single(self) -> tuple[Tensor, Tensor]:
        """[batch_size, longest] tokens and labels: a document a row, of about the same length."""
        size = self._recipe.batch_size
        if not self._pool:
            rows = sorted((self._encode(next(self._documents))[:256] for _ in range(16 * size)), key=len)
            self._pool = [rows[i : i + size] for i in range(0, len(rows), size)]
            self._rng.shuffle(self._pool)
        rows = self._pool.pop()
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        labels = torch.tensor([row + [_IGNORED] * (longest - len(row)) for row in rows])
        return tokens, labels

    def long(self) -> tuple[Tensor, Tensor]:
        """[1, length] tokens and labels: documents and conversations one after the other."""
        length = self._rng.choice(self._recipe.long_lengths)
        while len(self._row) < length:
            if self._rng.random() < 0.3:
                several = self._rng.sample(self._corpus.dialogues, self._rng.randint(2, 4))
                self._row += self._encode(self._conversation(several))
            else:
                self._row += self._encode(next(self._documents))
        tokens = torch.tensor([self._row[:length]])
        self._row = self._row[length:]
        return tokens, tokens

    def _in_turn(self) -> Iterator[str]:
        """Every dialogue and passage once, in another order each time round, with a docstring now and then."""
        documents: list[Dialogue | str] = [*self._corpus.dialogues, *self._corpus.passages]
        while True:
            self._rng.shuffle(documents)
            for document in documents:
                if self._corpus.docstrings and self._rng.random() < 0.03:
                    yield self._rng.choice(self._corpus.docstrings) + END_OF_TEXT
                if isinstance(document, str):
                    yield self._from_a_sentence(document)
                elif self._rng.random() < 0.15:
                    yield self._from_a_sentence(document.answer)
                else:
                    yield self._conversation([document])

    def _from_a_sentence(self, text: str) -> str:
        """Running text that begins anywhere, as prompts of /v1/completions do."""
        sentences = text.split(". ")
        return ". ".join(sentences[self._rng.randrange(len(sentences)) :]) + END_OF_TEXT

    def _conversation(self, dialogues: list[Dialogue]) -> str:
        """What CHAT_TEMPLATE makes of it, sometimes with a system message."""
        messages = as_messages(dialogues, self._rng)
        if self._rng.random() < 0.15:
            messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
        return "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids
