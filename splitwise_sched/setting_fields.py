"""What a settings class says about each of its fields, in the words of a command line."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

ENV_PREFIX = "SPLITWISE_"
_SEQUENCES = (list, tuple, set, frozenset)
_TYPE_NAMES: Mapping[type, tuple[str, str]] = {
    bool: ("", "true or false"),
    int: ("INTEGER", "a whole number"),
    float: ("NUMBER", "a number"),
    Path: ("PATH", "a path"),
}


@dataclass(frozen=True, slots=True)
class SettingField:
    """One setting: where it may be given, and what may be given.

    Attributes:
        flag: such as "--scheduler-host".
        variable: its name in the environment and in files, such as "SPLITWISE_SCHEDULER_HOST".
        other_variables: names that it also goes by, as other programs' users know it.
        kind: type of the value, or of each value of a sequence; None left out of a union.
        choices: the only values allowed, as text; empty when there are others.
        metavar: stands for the value in help.
        rule: what a value must be, to go on after "it must be".
        default: as text for help; None when there is none to show.
    """

    name: str
    flag: str
    variable: str
    kind: Any
    choices: tuple[str, ...]
    metavar: str
    rule: str
    description: str
    default: str | None
    is_required: bool
    is_optional: bool
    is_sequence: bool
    is_secret: bool
    other_variables: tuple[str, ...] = ()

    @property
    def is_bool(self) -> bool:
        return self.kind is bool and not self.is_sequence

    def value_of(self, text: str) -> object:
        """What to validate for ``text``, as it stands in a flag, in the environment or in a file."""
        if text == "" and self.is_optional:
            return None
        if self.is_sequence:
            return [self._one(part.strip()) for part in text.split(",")] if text.strip() else []
        return self._one(text)

    def _one(self, text: str) -> object:
        if get_origin(self.kind) is Literal:
            # Only strings compare equal to what was typed; Literal[1, 2] is met with its own members.
            return next((choice for choice in get_args(self.kind) if str(choice) == text), text)
        return text


def setting_fields(settings_class: type[BaseModel]) -> tuple[SettingField, ...]:
    """Every field of ``settings_class``, in its order."""
    return tuple(_describe(name, info) for name, info in settings_class.model_fields.items())


def _describe(name: str, info: FieldInfo) -> SettingField:
    kind, is_optional = _without_none(info.annotation)
    is_sequence = get_origin(kind) in _SEQUENCES
    if is_sequence:
        kind = _without_none(get_args(kind)[0])[0]
    choices = _choices(kind)
    type_name, rule = _TYPE_NAMES.get(kind, ("TEXT", "text"))
    if choices:
        type_name, rule = "|".join(choices), f"one of {', '.join(choices)}"
    if is_sequence:
        type_name, rule = f"{type_name},...", f"{rule}, or several with commas between them"
    is_secret = kind is SecretStr
    return SettingField(
        name=name,
        flag=f"--{name.replace('_', '-')}",
        # The prefix is not said twice: splitwise_role is SPLITWISE_ROLE.
        variable=f"{ENV_PREFIX}{name.upper().removeprefix(ENV_PREFIX)}",
        kind=kind,
        choices=choices,
        metavar=type_name,
        rule=rule + _bounds(info),
        description=info.description or "",
        default=None if is_secret else _default_text(info),
        is_required=info.is_required(),
        is_optional=is_optional,
        is_sequence=is_sequence,
        is_secret=is_secret,
        other_variables=_other_variables(info),
    )


def also_known_as(*variables: str) -> dict[str, Any]:
    """For a field's ``json_schema_extra``: variables of other programs that set it too."""
    return {"variables": list(variables)}


def _other_variables(info: FieldInfo) -> tuple[str, ...]:
    extra = info.json_schema_extra
    return tuple(str(name) for name in extra.get("variables", ())) if isinstance(extra, dict) else ()  # type: ignore[union-attr]


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """``annotation`` without None, and whether None was in it."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return members[0], True
    return annotation, False


def _choices(kind: Any) -> tuple[str, ...]:
    if get_origin(kind) is Literal:
        return tuple(str(choice) for choice in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return tuple(str(member.value) for member in kind)
    return ()


def _bounds(info: FieldInfo) -> str:
    """The field's limits, such as " between 1 and 65535" or " above 0 and at most 5"; empty without any."""
    limits = {
        name: getattr(limit, name)
        for limit in info.metadata
        for name in ("gt", "ge", "lt", "le")
        if getattr(limit, name, None) is not None
    }
    if limits.keys() == {"ge", "le"}:
        return f" between {limits['ge']} and {limits['le']}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most" if len(limits) > 1 else "of at most"}
    return "".join(
        f"{' and' if number else ''} {words[name]} {limit}" for number, (name, limit) in enumerate(limits.items())
    )


def _default_text(info: FieldInfo) -> str | None:
    if info.is_required():
        return None
    return text_of(info.get_default(call_default_factory=True, validated_data={}))


def text_of(value: object) -> str | None:
    """``value`` as one would type it; None for nothing."""
    if value is None or value in ((), [], ""):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, _SEQUENCES):
        return ",".join(str(text_of(item)) for item in value)
    return str(value)
