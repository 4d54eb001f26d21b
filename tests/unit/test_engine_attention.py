"""Attention over the paged pool against attention computed densely, for every packing and rule."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.transformers.attention import Rule  # noqa: E402
from engine.transformers.paged_kv import PagedKV  # noqa: E402
from engine.transformers.spans import (  # noqa: E402
    QUERY_SLICE,
    CausalMasks,
    ChunkSpan,
    DecodeSpan,
    PagedPass,
    group_by_length,
)

NUM_LAYERS, NUM_KV_HEADS, NUM_HEADS, NUM_BLOCKS = 3, 2, 6, 512


@dataclass(frozen=True)
class Case:
    """``work``: for each sequence, (tokens computed before, tokens of this pass)."""

    work: tuple[tuple[int, int], ...]
    block_size: int = 4
    packing: str = "block-major"
    key_width: int = 8
    value_width: int = 8
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


def dense(query: Any, key: Any, value: Any, rule: Rule) -> Any:
    """[num_queries, heads, width]: the last ``num_queries`` of the tokens attend. All inputs [tokens, heads, width]."""
    num_queries, num_tokens = query.shape[0], key.shape[0]
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(groups, 1)) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    for i in range(num_queries):
        position = num_tokens - num_queries + i
        scores[:, i, position + 1 :] = float("-inf")
        if rule.window is not None:
            scores[:, i, : max(0, position - rule.window + 1)] = float("-inf")
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.view(-1, 1, 1).expand(-1, num_queries, 1)], -1)
    weights = scores.softmax(-1)[..., :num_tokens]
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(groups, 1))


def check(case: Case) -> None:
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    width = max(case.key_width, case.value_width)
    # NaN in every block that nobody was given: whoever reads one shows it.
    storage = torch.full((NUM_BLOCKS * NUM_LAYERS * 2 * case.block_size * NUM_KV_HEADS * width,), float("nan"))
    kv = PagedKV(
        storage,
        num_blocks=NUM_BLOCKS,
        num_layers=NUM_LAYERS,
        block_size=case.block_size,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=width,
        packing=case.packing,
    )
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    sinks = torch.randn(NUM_HEADS, generator=generator) if case.sinks else None
    rule = Rule(case.key_width**-0.5, case.window, case.softcap, sinks)
    ordered = sorted(case.work, key=lambda item: (item[1] > 1, -item[0]))
    tables = [[free.pop() for _ in range(-(-(before + new) // case.block_size))] for before, new in ordered]
    for table in tables:
        kv.clear(table)

    def states(count: int, heads: int, width: int) -> Any:
        return torch.randn(count, heads, width, generator=generator)

    masks = CausalMasks(torch.float32, torch.device("cpu"))
    spans: list[DecodeSpan | ChunkSpan] = []
    num_single = sum(new == 1 for _, new in ordered)
    lens = [before + 1 for before, _ in ordered[:num_single]]
    for run in group_by_length(lens, max_tokens=40):
        spans.append(DecodeSpan(kv, run.start, tables[run.start : run.stop], lens[run.start : run.stop]))
    start = num_single
    for (before, new), table in list(zip(ordered, tables, strict=True))[num_single:]:
        spans.append(ChunkSpan(kv, start, table, num_tokens=new, num_before=before, masks=masks))
        start += new

    for layer in range(NUM_LAYERS):
        rows, expected = [], []
        for (before, new), table in zip(ordered, tables, strict=True):
            total = before + new
            key, value = states(total, NUM_KV_HEADS, case.key_width), states(total, NUM_KV_HEADS, case.value_width)
            query = states(new, NUM_HEADS, case.key_width)
            expected.append(dense(query, key, value, rule))
            if before:
                index = index_of(kv, table, range(before))
                pad = torch.nn.functional.pad
                padded = [pad(x[:before], (0, width - x.shape[-1])) for x in (key, value)]
                kv.write(layer, index, *padded)
            rows.append((query, key[before:], value[before:]))
        write_index = torch.cat([index_of(kv, t, range(b, b + n)) for (b, n), t in zip(ordered, tables, strict=True)])
        query, key, value = (torch.cat([row[i] for row in rows]).transpose(0, 1) for i in range(3))
        out = PagedPass(kv, write_index, spans).attend(layer, query, key, value, rule)
        torch.testing.assert_close(out, torch.cat(expected), atol=2e-5, rtol=1e-4)


def index_of(kv: PagedKV, table: list[int], positions: range) -> Any:
    blocks = torch.tensor([table[position // kv.block_size] for position in positions])
    return kv.write_index(blocks, torch.tensor([position % kv.block_size for position in positions]))


MIX = ((0, 1), (3, 1), (4, 1), (37, 1), (0, 9), (0, 4), (8, 5), (11, 30), (2, 1))
CASES = {
    "causal": Case(MIX),
    "layer-major": Case(MIX, packing="layer-major"),
    "blocks of one token": Case(MIX, block_size=1),
    "window": Case(MIX, window=6),
    "window of one": Case(MIX, window=1),
    "window as long as a sequence": Case(MIX, window=38),
    "softcap": Case(MIX, softcap=2.0),
    "sinks": Case(MIX, sinks=True),
    "window, softcap and sinks": Case(MIX, window=5, softcap=2.0, sinks=True),
    "values narrower than keys": Case(MIX, key_width=12, value_width=8),
    "values wider than keys": Case(MIX, key_width=8, value_width=12, window=7),
    "more queries than a slice": Case(((0, QUERY_SLICE + 40), (50, 2 * QUERY_SLICE + 3)), block_size=16),
    "more queries than a slice and a window": Case(((0, QUERY_SLICE + 40), (50, QUERY_SLICE + 3)), 16, window=100),
    "one decode": Case(((21, 1),)),
    "decodes of one length": Case(((21, 1), (21, 1))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_paged_attention_equals_dense_attention(case: Case) -> None:
    check(case)


@settings(deadline=None, max_examples=60)
@given(
    st.builds(
        Case,
        work=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=7).map(tuple),
        block_size=st.integers(1, 6),
        packing=st.sampled_from(["block-major", "layer-major"]),
        window=st.none() | st.integers(1, 20),
        softcap=st.none() | st.just(3.0),
        sinks=st.booleans(),
    )
)
def test_paged_attention_equals_dense_attention_for_any_mix(case: Case) -> None:
    check(case)


def test_window_and_sinks_and_softcap_all_change_the_result() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(9, 2, 4, generator=generator) for _ in range(3))
    rules = [Rule(0.5), Rule(0.5, window=3), Rule(0.5, softcap=1.0), Rule(0.5, sinks=torch.ones(2))]
    outputs = [dense(query, key, value, rule) for rule in rules]
    assert not any(torch.allclose(a, b, atol=1e-3) for i, a in enumerate(outputs) for b in outputs[:i])


@given(st.lists(st.integers(1, 500), max_size=30).map(lambda lens: sorted(lens, reverse=True)), st.integers(1, 2000))
def test_groups_cover_all_sequences_and_waste_little(kv_lens: list[int], max_tokens: int) -> None:
    runs = group_by_length(kv_lens, max_tokens)
    assert [i for run in runs for i in run] == list(range(len(kv_lens)))
    for run in runs:
        padded = kv_lens[run.start] * len(run)
        assert len(run) == 1 or padded <= max_tokens
        assert padded <= 1.25 * sum(kv_lens[i] for i in run)
