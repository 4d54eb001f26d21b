"""CPU time of the transformers engine against transformers' own generate(), on the same model and batch.

Both compute the same tokens, turn by turn, in one process on one thread; a row's figure is the median over rounds of
the ratio of process CPU times. Beside it: what the pool's packing costs decode attention.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from benchmarks.common import Report, at_most, parser, table
from engine.port import EngineDriver, Mode
from engine.testing import make_tiny_model
from engine.transformers import TransformersOptions, create
from engine.transformers.attention import Rule
from engine.transformers.paged_kv import PagedKV
from engine.transformers.spans import DecodeSpan, PagedPass
from splitwise_sched.types import Request, SamplingParams

MAX_RATIO = 1.15
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Row:
    """One shape of work: ``batch`` sequences of ``num_prompt`` tokens, each with ``num_output`` more."""

    name: str
    batch: int
    num_prompt: int
    num_output: int


ROWS = (
    Row("prefill", 4, 512, 1),
    Row("prefill, long", 1, 1536, 1),
    Row("decode", 8, 16, 96),
    Row("decode, long context", 8, 384, 64),
    Row("mixed", 8, 128, 32),
)
QUICK_ROWS = (Row("prefill", 2, 384, 1), Row("decode", 8, 16, 48), Row("mixed", 4, 128, 24))


def requests_of(row: Row, round_: int) -> list[Request]:
    generator = torch.Generator().manual_seed(round_)
    prompts = torch.randint(3, 1000, (row.batch, row.num_prompt), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=row.num_output, temperature=0.0, ignore_eos=True)
    return [Request(f"r{i}", "bench", tuple(prompt), sampling) for i, prompt in enumerate(prompts)]


def run_engine(engine: EngineDriver, requests: list[Request]) -> list[list[int]]:
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request.request_id, request, Mode.FULL)
    while engine.has_work():
        for event in engine.step():
            outputs[event.key] += getattr(event, "token_ids", ())
    return list(outputs.values())


def run_generate(model: Any, requests: list[Request]) -> list[list[int]]:
    prompt = torch.tensor([request.prompt_token_ids for request in requests])
    config_class: Any = transformers.GenerationConfig
    settings = config_class(max_new_tokens=requests[0].sampling.max_tokens, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    tokens: list[list[int]] = output[:, prompt.shape[1] :].tolist()
    return tokens


def cpu_time(work: Callable[[], list[list[int]]]) -> tuple[float, float, list[list[int]]]:
    """(CPU seconds, seconds, what it computed)"""
    wall, cpu = time.perf_counter(), time.process_time()
    output = work()
    return time.process_time() - cpu, time.perf_counter() - wall, output


def compare(report: Report, engine: EngineDriver, model: Any, row: Row, num_rounds: int) -> list[object]:
    """Run both, taking turns in who goes first; one round beforehand is not counted."""
    ratios, engine_times, generate_times = [], [], []
    for round_ in range(num_rounds + 1):
        requests = requests_of(row, round_)
        sides: list[Callable[[], tuple[float, float, list[list[int]]]]] = [
            lambda requests=requests: cpu_time(lambda: run_engine(engine, requests)),  # type: ignore[misc]
            lambda requests=requests: cpu_time(lambda: run_generate(model, requests)),  # type: ignore[misc]
        ]
        if round_ % 2:
            theirs, ours = sides[1](), sides[0]()
        else:
            ours, theirs = sides[0](), sides[1]()
        same = ours[2] == theirs[2]
        if round_ == 0:
            continue
        ratios.append(ours[0] / theirs[0])
        engine_times.append(ours[0])
        generate_times.append(theirs[0])
        report.runs.append(
            {
                **asdict(row),
                "round": round_,
                "engine_cpu_s": round(ours[0], 4),
                "generate_cpu_s": round(theirs[0], 4),
                "engine_s": round(ours[1], 4),
                "generate_s": round(theirs[1], 4),
                "same_tokens": same,
            }
        )
        if not same:
            raise SystemExit(f"{row.name}: the engine and generate() computed different tokens")
    ratio = statistics.median(ratios)
    report.targets.append(at_most(f"{row.name}: CPU time of generate()", ratio, MAX_RATIO))
    ours_s, theirs_s = statistics.median(engine_times), statistics.median(generate_times)
    return [row.name, row.batch, row.num_prompt, row.num_output, f"{ours_s:.3f}", f"{theirs_s:.3f}", f"{ratio:.2f}"]


def attention_cost(packing: str, kv_len: int, *, scattered: bool, batch: int = 8, num_rounds: int = 30) -> float:
    """CPU microseconds of decode attention in one layer, over a pool far larger than the caches.

    Args:
        scattered: block tables as they are in a pool that has been in use for long, not as in a fresh one.
    """
    num_layers, num_blocks, block_size, num_kv_heads, head_dim = 8, 1024, 16, 4, 64
    shape = {"num_blocks": num_blocks, "num_layers": num_layers, "block_size": block_size}
    storage = torch.randn(num_blocks * num_layers * 2 * block_size * num_kv_heads * head_dim)
    kv = PagedKV(storage, **shape, num_kv_heads=num_kv_heads, head_dim=head_dim, packing=packing)
    per_seq = kv_len // block_size
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    tables = (order if scattered else torch.arange(num_blocks))[: batch * per_seq].view(batch, -1)
    last = tables[:, -1]
    span = DecodeSpan(kv, 0, tables.tolist(), [kv_len] * batch)
    paged = PagedPass(kv, kv.write_index(last, torch.full_like(last, block_size - 1)), [span])
    query = torch.randn(2 * num_kv_heads, batch, head_dim)
    key, value = torch.randn(num_kv_heads, batch, head_dim), torch.randn(num_kv_heads, batch, head_dim)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(num_rounds):
            start = time.process_time()
            for layer in range(num_layers):
                paged.attend(layer, query, key, value, Rule(head_dim**-0.5))
            best = min(best, time.process_time() - start)
    return best / num_layers * 1e6


def main() -> None:
    flags = parser(__doc__)
    args = flags.parse_args()
    torch.set_num_threads(1)
    rows, num_rounds = (QUICK_ROWS, 3) if args.quick else (ROWS, 7)
    report = Report("engine", {"model": MODEL, "dtype": "float32", "threads": 1, "rounds": num_rounds})
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as folder:
        path = make_tiny_model("llama", folder, vocab_size=8192, **MODEL)
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        model.generation_config.eos_token_id = None
        engine = create(TransformersOptions(model=str(path), num_blocks=512, num_threads=1))
        lines = [compare(report, engine, model, row, num_rounds) for row in rows]
        engine.close()
    print(table(["work", "batch", "prompt", "output", "engine CPU s", "generate CPU s", "ratio"], lines))
    print()
    packings = []
    for kv_len, scattered in ((128, True), (128, False), (512, True), (512, False), (1024, True), (1024, False)):
        costs = {p: attention_cost(p, kv_len, scattered=scattered) for p in ("block-major", "layer-major")}
        report.runs.append(
            {"attention_kv_len": kv_len, "scattered": scattered, **{name: round(us, 1) for name, us in costs.items()}}
        )
        blocks = "scattered" if scattered else "in order"
        packings.append([f"8 x {kv_len} tokens, blocks {blocks}", *(f"{us:.0f}" for us in costs.values())])
    print(table(["decode attention, us a layer", "block-major", "layer-major"], packings))
    print()
    report.finish(args.json)


if __name__ == "__main__":
    main()
