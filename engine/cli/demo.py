"""``splitwise-sched demo``: a whole deployment on this machine, real prompts, and every token checked."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from pydantic import Field

from engine.demo.fleet import READY_TIMEOUT_S, Fleet, free_port
from engine.plugins import load_engine
from engine.settings import EngineSettings
from splitwise_sched.cli.options import settings_command
from splitwise_sched.errors import ConfigError
from splitwise_sched.settings import ExplicitSettings

if TYPE_CHECKING:
    import httpx
    from rich.console import Console

    from engine.demo.client import Answer
    from engine.demo.workload import DemoRequest

MODEL_NAME = "demo"
KV_BLOCK_SIZE = 16
NUM_STREAMED = 2
MAX_INSTANCES = 16


class DemoSettings(ExplicitSettings):
    """What the demo starts and sends."""

    prefill: int = Field(2, ge=1, le=MAX_INSTANCES, description="Prefill instances.")
    decode: int = Field(2, ge=1, le=MAX_INSTANCES, description="Decode instances.")
    transport: Literal["shm", "tcp"] = Field("shm", description="How KV blocks move between them.")
    cache_transfer_protocol: str | None = Field(
        None, description="The same in full, as serve takes it, such as rdma or rdma,ipc. Left out: --transport."
    )
    prefill_host: str = Field("127.0.0.1", description="Address that prefill instances move KV by.")
    decode_host: str = Field("127.0.0.1", description="Address that decode instances move KV by.")
    engine: str = Field(
        "transformers",
        description="Engine of the instances: transformers, or another that serve drives, such as llama_cpp, with a "
        "--model of its own (for llama_cpp a GGUF file, tokenizer.json beside it). Answers must equal those of "
        "generate(), or of that engine alone.",
    )
    model: str | None = Field(
        None, description="Model directory or hub id. Left out: a small Llama, made and trained on the spot."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "float32", description="Type of weights and KV; float32 makes answers exactly comparable."
    )
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="cpu, cuda or cuda:<n>; of instances and generate().",
    )
    requests: int = Field(64, ge=1, le=100_000, description="Requests to send.")
    concurrency: int = Field(16, ge=1, le=1024, description="Requests under way at a time.")
    chaos: bool = Field(
        False, description="Kill, restart and stall instances meanwhile; all requests stream at once, again and again."
    )
    chaos_s: float = Field(
        60.0, ge=1, le=86_400, description="Seconds that --chaos lasts; longer if its first kills and stop take longer."
    )
    kv_blocks: int = Field(1024, ge=8, description="KV blocks of 16 tokens on each instance.")
    instance_lease_s: float = Field(
        2.0,
        ge=0.3,
        le=300,
        description="An instance that stands still for so long is dead to the others; a slow machine needs more.",
    )
    ready_timeout_s: float = Field(
        READY_TIMEOUT_S, gt=0, le=3600, description="How long instances and gateway may take to come up, each."
    )


@settings_command(DemoSettings, name="demo")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all that was found there, as JSON.")
def command(settings: DemoSettings, json_file: Path | None) -> int:
    """Start Redis, prefill and decode instances and a gateway; send prompts; compare every token with generate().

    With --engine other than transformers, with what that engine makes of them alone.

    Exit code 0 only when all tokens are right. Everything that it started is stopped at its end.
    """
    from rich.console import Console

    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no directory {json_file.parent}")
    for noisy in ("httpx", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    console = Console()
    subject = _subject(settings, console)
    with Fleet() as fleet:
        try:
            return asyncio.run(_run(settings, json_file, console, fleet, subject))
        except asyncio.CancelledError:
            return 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True)
class _Subject:
    """What the instances serve.

    Attributes:
        model: what ``serve --model`` gets.
        tokenizer: directory of its tokenizer.
        reference: what the answers must equal, in words.
    """

    engine: EngineSettings
    model: Path
    tokenizer: Path
    reference: str


def _subject(settings: DemoSettings, console: Console) -> _Subject:
    """Raises ConfigError: no such engine, or no model or tokenizer where it should be."""
    if settings.engine == "transformers":
        directory = _model_directory(settings.model, console)
        return _Subject(_engine_settings(settings, directory), directory, directory, "generate() of the same model")
    plugin = load_engine(settings.engine)
    if settings.model is None:
        raise ConfigError(f"--engine {settings.engine}: give its --model too; one is made on the spot for transformers")
    model = Path(settings.model).resolve()
    if not model.exists():
        raise ConfigError(f"--model {settings.model}: there is no such file")
    engine = _engine_settings(settings, model)
    tokenizer = plugin.tokenizer_dir(engine)
    if tokenizer is None:
        raise ConfigError(f"--model {settings.model}: there is no tokenizer.json beside it, which the gateway needs")
    return _Subject(engine, model, tokenizer, f"{settings.engine} alone")


def _engine_settings(settings: DemoSettings, model: Path) -> EngineSettings:
    return EngineSettings(
        engine=settings.engine,
        model=str(model),
        served_model_name=MODEL_NAME,
        dtype=settings.dtype,
        device=settings.device,
        num_gpu_blocks_override=settings.kv_blocks,
        num_threads=1,
    )


def _model_directory(model: str | None, console: Console) -> Path:
    """A directory, made, downloaded or as named."""
    if model is None:
        from engine.demo.model import ensure_demo_model

        return ensure_demo_model(console=console)
    if Path(model).is_dir():
        return Path(model).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise ConfigError(
            f"--model {model} is no directory here, and the hub gives no model of that name ({exc}): give a directory "
            "with config.json, tokenizer.json and safetensors, or a hub id that can be reached"
        ) from exc


async def _run(
    settings: DemoSettings, json_file: Path | None, console: Console, fleet: Fleet, subject: _Subject
) -> int:
    import httpx

    from engine.demo.client import TIMEOUT_S
    from engine.demo.report import (
        Row,
        chaos_facts,
        print_chaos,
        print_differences,
        print_summary,
        print_table,
        summary,
        write_json,
    )
    from splitwise_sched.store import Store

    # Whatever awaits something ends in order; an exception out of a signal handler would end the loop in its middle.
    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    port, max_len = await _start(settings, console, fleet, subject)
    requests = _workload(settings, subject.tokenizer, max_len)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
        faults: dict[str, int] = {}
        failures: list[str] = []
        if settings.chaos:
            answers, failures, faults = await _send_in_chaos(settings, console, fleet, client, requests)
        else:
            answers = await _send(settings, console, fleet, client, requests)
    store = Store(fleet.settings)
    try:
        await store.connect()
        records = [await store.request_record(a.request.request_id) for a in answers]
        server = store.server
    finally:
        await store.close()
    expected = _reference(settings, console, subject, requests)
    right = {(r.prompt_token_ids, r.max_tokens): tokens for r, tokens in zip(requests, expected, strict=True)}
    rows = [
        Row(a, r, right[a.request.prompt_token_ids, a.request.max_tokens])
        for a, r in zip(answers, records, strict=True)
    ]
    if not settings.chaos:
        print_table(console, rows)
    found = summary(
        rows,
        num_prefill=settings.prefill,
        num_decode=settings.decode,
        redis_server=server,
        model=str(subject.model),
    )
    if settings.chaos:
        found["chaos"] = chaos_facts(rows, faults, failures)
        print_chaos(console, found["chaos"])
    print_differences(console, rows, subject.reference)
    print_summary(console, found, subject.reference)
    if json_file is not None:
        write_json(json_file, found)
    return 0 if found["mismatched"] == 0 and not failures else 1


async def _start(settings: DemoSettings, console: Console, fleet: Fleet, subject: _Subject) -> tuple[int, int]:
    """Everything up and healthy; returns the gateway's port, and how many tokens a request may have on any instance."""
    count = settings.prefill + settings.decode
    protocols = settings.cache_transfer_protocol or {"shm": "ipc,tcp", "tcp": "tcp"}[settings.transport]
    hosts = {"prefill": settings.prefill_host, "decode": settings.decode_host}
    lease = ("--instance-lease-s", str(settings.instance_lease_s))
    flags = ("--cache-transfer-protocol", protocols, "--dtype", settings.dtype, "--served-model-name", MODEL_NAME,
             "--device", settings.device, "--engine", settings.engine,
             "--num-gpu-blocks-override", str(settings.kv_blocks))  # fmt: skip
    with console.status(f"{fleet.redis.description}; starting {count} instances and a gateway"):
        for role, number in (("prefill", settings.prefill), ("decode", settings.decode)):
            for index in range(number):
                fleet.start_instance(role, index, subject.model, (*flags, *lease, "--pd-comm-host", hosts[role]))
        port = free_port()
        fleet.start("gateway", ("gateway", "--port", str(port), "--model", str(subject.tokenizer), *lease))
        instances = await fleet.wait_for_instances(count, settings.ready_timeout_s)
        await fleet.wait_for_gateway(port, settings.ready_timeout_s)
    console.print(
        f"{fleet.redis.description} on port {fleet.redis.port}, {settings.prefill} prefill and {settings.decode} "
        f"decode instances, gateway on http://127.0.0.1:{port}/v1"
    )
    return port, min(record.max_model_len for record in instances)


def _workload(settings: DemoSettings, tokenizer_dir: Path, max_len: int) -> list[DemoRequest]:
    from engine.demo.corpus import load_corpus
    from engine.demo.workload import make_workload
    from splitwise_sched.tokenizer import Tokenizer

    corpus = load_corpus()
    questions = [ways[0] for ways, _ in corpus.dialogues]
    tokenizer = Tokenizer.from_pretrained_dir(tokenizer_dir)
    room = min(max_len, (settings.kv_blocks - 1) * KV_BLOCK_SIZE)
    return make_workload(tokenizer, list(corpus.passages), questions, count=settings.requests, max_len=room)


async def _send(
    settings: DemoSettings, console: Console, fleet: Fleet, client: httpx.AsyncClient, requests: list[DemoRequest]
) -> list[Answer]:
    """A few one by one, shown as they stream; the rest together, behind a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from engine.demo.client import complete, complete_all

    chats = [r for r in requests if r.title.endswith("?")][:NUM_STREAMED]
    answers = {}
    for request in chats:
        console.print(f"\n[bold]{request.title}[/]")
        show = partial(console.print, end="", markup=False, highlight=False, style="cyan")
        answers[request.request_id] = await complete(client, MODEL_NAME, request, on_text=show)
        console.print()
    console.print()
    rest = [r for r in requests if r.request_id not in answers]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{settings.concurrency} requests at a time", total=len(rest))
        for answer in await complete_all(
            client, MODEL_NAME, rest, settings.concurrency, lambda _: progress.advance(task)
        ):
            answers[answer.request.request_id] = answer
    fleet.check()
    return [answers[r.request_id] for r in requests]


async def _send_in_chaos(
    settings: DemoSettings, console: Console, fleet: Fleet, client: httpx.AsyncClient, requests: list[DemoRequest]
) -> tuple[list[Answer], list[str], dict[str, int]]:
    """All streams at once, again and again, while instances are killed; what failed, and what was done to them."""
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from engine.demo.chaos import FIRST_TURN_TIMEOUT_S, Chaos
    from engine.demo.client import keep_completing

    columns = (TextColumn("{task.description}: {task.completed} answers"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{len(requests)} streams", total=None)
        chaos = Chaos(fleet, settings.prefill + settings.decode, progress.console.print)
        doing = asyncio.create_task(chaos.run())
        until = time.monotonic() + settings.chaos_s

        def goes_on() -> bool:
            wanted_s = 0 if chaos.had_each_fault or doing.done() else FIRST_TURN_TIMEOUT_S
            return time.monotonic() < until + wanted_s

        try:
            answers, failures = await keep_completing(
                client, MODEL_NAME, requests, goes_on, lambda: progress.advance(task)
            )
        finally:
            if doing.done():
                doing.result()
            doing.cancel()
            await asyncio.wait([doing])
    return answers, failures, chaos.faults.to_dict()


def _reference(
    settings: DemoSettings, console: Console, subject: _Subject, requests: list[DemoRequest]
) -> list[tuple[int, ...]]:
    from rich.progress import track

    if settings.engine == "transformers":
        from engine.demo.reference import generate_reference

        answers = generate_reference(subject.model, requests, settings.dtype, settings.device)
    else:
        from engine.demo.alone import run_alone

        answers = run_alone(subject.engine, requests)
    return list(track(answers, f"the same by {subject.reference}", total=len(requests), console=console))
