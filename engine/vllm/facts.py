"""What a ``vllm serve`` tells of itself: version, models, load. Pure; nothing in it is trusted."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

MAX_VERSION_CHARS = 80
MAX_LEN = 1 << 31
LOADS_FAILED = "kv_loads_failed"
FIGURES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    # The connector's own.
    "vllm:splitwise_kv_loads_failed_total": LOADS_FAILED,
}
SAMPLE = re.compile(rb"^(vllm:[a-z_]+)\{([^}]*)\} (\S+)", re.MULTILINE)
ENGINE = re.compile(rb'engine="(\d+)"')


@dataclass(frozen=True, slots=True)
class ServedModel:
    """
    Attributes:
        root: what the server was told to load, a directory or a hub id.
    """

    name: str
    root: str
    max_model_len: int


def version_of(body: bytes) -> str | None:
    """Of an answer of ``/version``; None when it is none."""
    try:
        version = json.loads(body)["version"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return version[:MAX_VERSION_CHARS] if isinstance(version, str) else None


def served_models_of(body: bytes) -> dict[str, ServedModel]:
    """By name, in the server's order; without those that cannot be used."""
    try:
        cards = json.loads(body)["data"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return {}
    found = {}
    for card in cards if isinstance(cards, list) else ():
        if not isinstance(card, dict):
            continue
        name, root, length = card.get("id"), card.get("root"), card.get("max_model_len")
        if isinstance(name, str) and type(length) is int and 1 <= length < MAX_LEN:
            found[name] = ServedModel(name, root if isinstance(root, str) else "", length)
    return found


def figures_of(body: bytes) -> tuple[dict[str, int | float | str], int]:
    """Out of an answer of ``/metrics``: what it counts, summed over its engines, and how many these are."""
    figures: dict[str, int | float | str] = {}
    engines = set()
    for name, labels, value in SAMPLE.findall(body):
        if (figure := FIGURES.get(name.decode())) is None:
            continue
        try:
            number = float(value) + float(figures.get(figure, 0))
            figures[figure] = round(number, 4) if figure == "kv_usage" else int(number)
        except (ValueError, OverflowError):
            continue
        engines.update(ENGINE.findall(labels))
    return figures, len(engines)
