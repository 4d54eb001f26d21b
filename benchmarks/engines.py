"""What disaggregation costs and gains on each engine of this project, beside the same engine doing both.

Two instances of one thread each, first as prefill and decode, then the same two processes as mixed ones: TTFT and
TPOT at a quarter, half and four fifths of what the mixed ones get through (in the quick form at half alone). What our
hooks cost a step, in µs of CPU, at idle (decode alone) and while KV moves. And how much of a transfer is left when a
prompt of 512 tokens is computed: from the first token (of vLLM: from the last blocks, which are ready before it) to
decode's first step, beside the time from the first blocks that were ready to that step.

Engines are those that are installed; vLLM's environment has only vLLM: ``make test-vllm`` makes it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import Report, parser, table
from benchmarks.serving.findings import LONG_PROMPT, NUM_LONG, report_overlap
from benchmarks.serving.latency import LOADS, NUM_OUTPUT, PROMPT_TOKENS, QUICK_LOADS, compare, one
from engine.testing import make_tiny_model
from splitwise_sched.frontend import FrontEnd

FIELDS: dict[str, Any] = {
    "dtype": "float32",
    "served_model_name": "bench",
    "max_num_batched_tokens": 128,
    "max_num_seqs": 16,
}
DRIVEN_FIELDS = {**FIELDS, "num_gpu_blocks_override": 512, "num_threads": 1}
VLLM_ARGS = {
    "enforce_eager": True,
    "kv_transfer_config": {
        "kv_connector": "NotingConnector",
        "kv_connector_module_path": "benchmarks.serving.vllm_notes",
    },
}
VLLM_FIELDS = {**FIELDS, "max_model_len": 1024, "engine_args": json.dumps(VLLM_ARGS)}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
ENGINES = {"transformers": "transformers", "llama_cpp": "xllamacpp", "vllm": "vllm"}
TIMEOUT_S = 900.0
Rows = TypeVar("Rows")


def installed() -> list[str]:
    found = [engine for engine, module in ENGINES.items() if importlib.util.find_spec(module) is not None]
    # vLLM brings its own transformers, which is not the engine that it is compared with.
    return ["vllm"] if "vllm" in found else found


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--engine", action="append", choices=ENGINES, help="may be given again; all that are installed")
    args = flags.parse_args()
    count, loads = (6, QUICK_LOADS) if args.quick else (30, LOADS)
    shape = SMALL if args.quick else LARGE
    settings = {
        "model": shape,
        **FIELDS,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": NUM_OUTPUT,
        "requests": count,
    }
    report = Report("engines", settings)
    found: tuple[list[list[object]], ...] = ([], [], [])
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as folder:
        model = make_tiny_model("llama", folder, **shape)
        for engine in args.engine or installed():
            for table_rows, more in zip(found, run(engine, model, count, loads, report), strict=True):
                table_rows.extend(more)
    headers = (
        ["engine, instances", "requests/s", "TTFT ms p50", "p99", "TPOT ms p50", "p99"],
        ["CPU a step", "hooks us", "engine us", "hooks' part"],
        ["512-token prompt", "after prefill ms", "whole transfer ms", "part"],
    )
    for header, rows in zip(headers, found, strict=True):
        print(table(header, rows), end="\n\n")
    report.finish(args.json)


def run(engine: str, model: Path, count: int, loads: Sequence[float], report: Report) -> tuple[list[list[object]], ...]:
    """Rows of the three tables."""
    return (
        run_vllm(model, count, loads, report) if engine == "vllm" else run_driven(engine, model, count, loads, report)
    )


def run_driven(
    engine: str, model: Path, count: int, loads: Sequence[float], report: Report
) -> tuple[list[list[object]], ...]:
    from benchmarks.serving import driven

    if engine == "llama_cpp":
        from engine.llama_cpp.testing import make_tiny_gguf

        model = make_tiny_gguf(model)
    latencies = within(compare(engine, model, DRIVEN_FIELDS, count, loads, report))
    return latencies, *within(driven.measure(engine, model, DRIVEN_FIELDS, count, report))


def run_vllm(model: Path, count: int, loads: Sequence[float], report: Report) -> tuple[list[list[object]], ...]:
    from benchmarks.serving import vllm_notes, vllm_pair
    from engine.vllm.testing import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    names = [f"long-{i}" for i in range(NUM_LONG)]

    async def long_prompts(frontend: FrontEnd) -> None:
        for name in names:
            await one(frontend, name, LONG_PROMPT, 2)

    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as notes:
        os.environ[vllm_notes.DIRECTORY] = notes
        latencies = within(compare("vllm", model, VLLM_FIELDS, count, loads, report, long_prompts))
        overlaps = vllm_notes.read_overlaps(Path(notes), names)
    hooks = vllm_pair.measure(model, count, report)
    return latencies, hooks, report_overlap("vllm", overlaps, report)


def within(measurement: Coroutine[Any, Any, Rows]) -> Rows:
    return asyncio.run(asyncio.wait_for(measurement, TIMEOUT_S))


if __name__ == "__main__":
    main()
