"""Values of an engine's objects as JSON values: nothing is pickled, and nothing goes that could not come back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from splitwise_sched.errors import InvalidRequest

MAX_DEPTH = 32


def plain(value: Any, where: str) -> Any:
    """``value`` made of dict, list, str, int, float, bool and None.

    Tuples and arrays (whatever has ``tolist``) become lists; objects with ``to_dict`` and dataclasses become dicts; an
    Enum becomes its value.

    Args:
        where: names the value in errors, such as "request r1".

    Raises:
        InvalidRequest: names the part that is none of these, or is nested too deeply.
    """
    return _plain(value, where, 0)


def plain_dict(thing: Any, where: str) -> dict[str, Any]:
    """What ``thing.to_dict()`` tells, as ``plain`` has it."""
    to_dict = getattr(thing, "to_dict", None)
    if not callable(to_dict):
        raise InvalidRequest(f"{where} is a {type(thing).__name__}: it must have to_dict()")
    value = _plain(to_dict(), where, 0)
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where}: to_dict() gave a {type(value).__name__}, not a dict")
    return value


def _plain(value: Any, where: str, depth: int) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, where, depth)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise InvalidRequest(f"{where} is {value}: it must be a 64-bit integer")
        return int(value)
    if isinstance(value, float):
        # JSON has no NaN and no infinity.
        return float(value) if math.isfinite(value) else None
    if depth >= MAX_DEPTH:
        raise InvalidRequest(f"{where} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidRequest(f"{where} has the key {key!r}: it must be text")
        return {key: _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, where, depth + 1) for item in value]
    if callable(getattr(value, "tolist", None)):
        return _plain(value.tolist(), where, depth + 1)
    if callable(getattr(value, "to_dict", None)):
        return _plain(value.to_dict(), where, depth + 1)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}", depth + 1) for f in fields(value)}
    raise InvalidRequest(
        f"{where} is a {type(value).__name__}, which is no JSON value: leave it out, or give it as one"
    )
