"""Gives settings classes their values: flags before environment, environment before files, files before defaults.

Settings classes read nothing by themselves; whoever embeds the library constructs them. Only a program that a user
starts comes through here, so that every value can be traced to where it was given.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from splitwise_sched.errors import ConfigError, SplitwiseError
from splitwise_sched.setting_fields import ENV_PREFIX, SettingField, setting_fields

MAX_FILE_BYTES = 1 << 20
_SHOWN_CHARACTERS = 200
# What pydantic says when the value is not of the field's type, or outside its limits: SettingField.rule covers it.
_RULE_ERRORS = (
    "_parsing",
    "_type",
    "_from_float",
    "greater_than",
    "less_than",
    "literal_error",
    "enum",
    "finite_number",
)


@dataclass(frozen=True, slots=True)
class Given:
    """A value as its user gave it.

    Attributes:
        value: text as typed; bool for an on/off flag.
        origin: what gave it: the flag, or the variable and where it was set.
    """

    value: str | bool
    origin: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One ``KEY=VALUE`` line."""

    key: str
    value: str
    line: int


def load(
    classes: Sequence[type[BaseModel]],
    *,
    flags: Mapping[str, str | bool | None],
    environ: Mapping[str, str],
    files: Sequence[Path] = (),
    program: str = "this program",
) -> list[BaseModel]:
    """One instance of each class, from all that was given.

    Args:
        flags: field name to what was typed; None counts as not given.
        files: later ones win over earlier ones.
        program: what the settings are of, for messages.
    Raises:
        ConfigError: names what was given, where, and what would be right.
    """
    fields = {field.name: field for settings_class in classes for field in setting_fields(settings_class)}
    given: dict[str, Given] = {}
    for path in files:
        given.update(_from_file(path, fields.values(), program))
    for field in fields.values():
        for variable in (field.variable, *field.other_variables):
            if variable in environ:
                given[field.name] = Given(environ[variable], f"environment variable {variable}")
                break
    for name, value in flags.items():
        if value is not None:
            given[name] = Given(value, fields[name].flag)
    return [_build(settings_class, given) for settings_class in classes]


def read_env_file(path: Path) -> Iterator[FileEntry]:
    """The ``KEY=VALUE`` lines of a file, quoted and commented as a shell would have them.

    Raises:
        ConfigError: the file cannot be read, or a line is something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"configuration file {path} cannot be read: {exc.strerror}") from exc
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"configuration file {path} is larger than {MAX_FILE_BYTES} bytes: it cannot be one")
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"configuration file {path} is not UTF-8 text: {exc.reason} at byte {exc.start}") from exc
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(_without_comment(line))
        except ValueError as exc:
            raise ConfigError(f"{path}, line {number}: {line.strip()[:_SHOWN_CHARACTERS]!r}: {exc}") from exc
        if words[:1] == ["export"]:
            words = words[1:]
        if not words:
            continue
        key, equals, value = words[0].partition("=")
        if not equals or not key or len(words) > 1:
            raise ConfigError(
                f"{path}, line {number}: {line.strip()[:_SHOWN_CHARACTERS]!r} is not KEY=VALUE: write one setting a "
                "line, without blanks around the equals sign, and quote a value with blanks in it"
            )
        yield FileEntry(key, value, number)


def _without_comment(line: str) -> str:
    """``line`` up to a # that begins a word outside quotes; shlex would cut words such as p#1 as well."""
    quote = ""
    for position, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (position == 0 or line[position - 1].isspace()):
            return line[:position]
    return line


def _from_file(path: Path, fields: Iterable[SettingField], program: str) -> dict[str, Given]:
    by_variable = {variable: known for known in fields for variable in (known.variable, *known.other_variables)}
    given: dict[str, Given] = {}
    for entry in read_env_file(path):
        field = by_variable.get(entry.key)
        if field is None:
            raise ConfigError(
                f"{path}, line {entry.line}: {entry.key} is not a setting of {program}"
                + _suggestion(entry.key, list(by_variable))
            )
        if field.name in given:
            raise ConfigError(f"{path}, line {entry.line}: {entry.key} was set before in this file: keep one")
        given[field.name] = Given(entry.value, f"{entry.key} ({path}, line {entry.line})")
    return given


def _suggestion(key: str, known: list[str]) -> str:
    close = get_close_matches(key.upper(), [*known, *(name.removeprefix(ENV_PREFIX) for name in known)], n=1)
    if not close:
        return ": see --help for all settings"
    return f": did you mean {ENV_PREFIX}{close[0].removeprefix(ENV_PREFIX)}?"


def _build(settings_class: type[BaseModel], given: Mapping[str, Given]) -> BaseModel:
    fields = {field.name: field for field in setting_fields(settings_class)}
    values: dict[str, Any] = {}
    for name in fields.keys() & given.keys():
        value = given[name].value
        values[name] = fields[name].value_of(value) if isinstance(value, str) else value
    try:
        return settings_class(**values)
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
        raise ConfigError("; ".join(dict.fromkeys(_explain(error, fields, given) for error in errors))) from exc
    except SplitwiseError as exc:
        origin = _origin_of_refusal(settings_class, values, given)
        raise ConfigError(f"{origin}: {exc}" if origin is not None else str(exc)) from exc


def _origin_of_refusal(
    settings_class: type[BaseModel], values: Mapping[str, Any], given: Mapping[str, Given]
) -> str | None:
    """What gave the value that a validator refused with an error of ours, which, unlike pydantic's, names no field."""
    for name, value in values.items():
        try:
            settings_class(**{name: value})
        except ValidationError:
            continue
        except SplitwiseError:
            return given[name].origin
    return None


def _explain(error: Any, fields: Mapping[str, SettingField], given: Mapping[str, Given]) -> str:
    """What is wrong, in the words of whoever gave the value."""
    # A validator's own words stand for themselves; pydantic puts "Value error, " before them.
    own_words = str(error["ctx"]["error"]) if error["type"] in ("value_error", "assertion_error") else None
    location = error["loc"]
    if not location or str(location[0]) not in fields:
        return own_words or str(error["msg"])
    field = fields[str(location[0])]
    if error["type"] == "missing":
        return (
            f"{field.flag} is missing: give {field.flag} {field.metavar}, or set {field.variable} in the environment "
            "or in a --config file"
        )
    source = given.get(field.name)
    origin = source.origin if source is not None else f"the default of {field.flag}"
    value = "" if field.is_secret else f" is {str(source.value if source else field.default)[:_SHOWN_CHARACTERS]!r}"
    if own_words is not None:
        return f"{origin}{value}: {own_words}"
    if any(part in error["type"] for part in _RULE_ERRORS):
        return f"{origin}{value}: it must be {field.rule}"
    return f"{origin}{value}: {error['msg'][:1].lower()}{error['msg'][1:]}"
