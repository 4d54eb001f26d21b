"""The scripts as they are sent to Redis: each with the shared functions that it uses, and no others.

A server runs a script's whole text at every call, and makes each function in it anew: what is not used costs, too.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

# In front of every script, in this order, as far as it is used.
SHARED = ("common", "preferred", "waiting_room", "rate")
SCRIPTS = (
    "submit", "resubmit", "bind", "step", "finish", "give_back", "cancel", "expire", "register", "renew", "drain",
    "reap", "renew_frontend", "lapsed", "orphans", "audit",
)  # fmt: skip

_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)
_STATEMENT = re.compile(r"^(?=local |\w+ = )", re.MULTILINE)
_DEFINED = re.compile(r"(?:local function (\w+)|local ([\w, ]+)|(\w+) = )")
_WORD = re.compile(r"\w+")


@cache
def script_texts() -> dict[str, str]:
    """By script: what EVALSHA runs."""
    folder = resources.files("splitwise_sched") / "lua"

    def text_of(name: str) -> str:
        return _COMMENT.sub("", (folder / f"{name}.lua").read_text(encoding="utf-8"))

    shared = [statement for part in SHARED for statement in _STATEMENT.split(text_of(part)) if statement.strip()]
    return {name: _linked(shared, text_of(name)) for name in SCRIPTS}


def _linked(shared: list[str], script: str) -> str:
    """``script`` behind those statements, of what is shared, that it needs, in their order."""
    defined = [_names(statement) for statement in shared]
    used, needed = set(_WORD.findall(script)), set[int]()
    while more := {i for i, names in enumerate(defined) if i not in needed and not names.isdisjoint(used)}:
        needed |= more
        used.update(word for i in more for word in _WORD.findall(shared[i]))
    return "".join(shared[i] for i in sorted(needed)) + script


def _names(statement: str) -> set[str]:
    """What a statement at the outermost level of a shared file defines, or declares to be defined later."""
    match = _DEFINED.match(statement)
    if match is None:
        raise ValueError(f"no definition: {statement[:60]!r}")
    return set(_WORD.findall(match.group(1) or match.group(2) or match.group(3)))
