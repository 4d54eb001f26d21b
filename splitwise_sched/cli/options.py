"""Makes a verb of a function that takes settings: flags, environment and files come from the settings classes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from splitwise_sched.configuration import load
from splitwise_sched.setting_fields import SettingField, setting_fields

_CONFIG = "config"


class SettingOption(click.Option):
    """A flag that stands for one field of a settings class.

    Its value stays text: the settings class alone says what is right, whether a flag, the environment or a file
    gave it.
    """

    def __init__(self, field: SettingField, section: str) -> None:
        self.section = section
        flag = f"{field.flag}/--no-{field.flag[2:]}" if field.is_bool else field.flag
        super().__init__(
            [flag, field.name],
            type=click.BOOL if field.is_bool else click.STRING,
            default=None,
            metavar=None if field.is_bool else field.metavar,
            help=_help(field),
        )


class SettingsCommand(click.Command):
    """A verb whose help lists its flags by the settings class that they belong to."""

    settings_classes: tuple[type[BaseModel], ...] = ()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "General options"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def settings_command(
    *classes: type[BaseModel], name: str, **attributes: Any
) -> Callable[[Callable[..., Any]], SettingsCommand]:
    """Decorator: the verb ``name``, whose function is called with one instance of each of ``classes``, in order.

    The function may return an exit code. Other click options and arguments on it arrive as keywords. A class's title
    in help is ``model_config["title"]``, or made of its name.
    """
    check_distinct(classes)

    def decorate(function: Callable[..., Any]) -> SettingsCommand:
        def callback(**parameters: Any) -> Any:
            files: Sequence[str] = parameters.pop(_CONFIG)
            names = [field.name for settings_class in classes for field in setting_fields(settings_class)]
            settings = load(
                classes,
                flags={field: parameters.pop(field) for field in names},
                environ=os.environ,
                files=[Path(file) for file in files],
                program=f"`splitwise-sched {name}`",
            )
            return function(*settings, **parameters)

        own: list[click.Parameter] = list(reversed(getattr(function, "__click_params__", [])))
        options = [
            SettingOption(field, title_of(settings_class))
            for settings_class in classes
            for field in setting_fields(settings_class)
        ]
        config = click.Option(
            ["--config", _CONFIG],
            multiple=True,
            metavar="FILE",
            help="File of KEY=VALUE lines, such as conf/scheduler.env, with the names that the environment has. May "
            "be given several times; later files win, the environment wins over files, and flags over all.",
        )
        attributes.setdefault("help", function.__doc__)
        command = SettingsCommand(name, callback=callback, params=[*own, *options, config], **attributes)
        command.settings_classes = classes
        return command

    return decorate


def check_distinct(classes: Sequence[type[BaseModel]]) -> None:
    """Two settings of one name would be one flag with two meanings."""
    names = [field.name for settings_class in classes for field in setting_fields(settings_class)]
    twice = {name for name in names if names.count(name) > 1} | ({_CONFIG} & set(names))
    assert not twice, f"{[c.__name__ for c in classes]} have fields of the same name: {sorted(twice)}"


def title_of(settings_class: type[BaseModel]) -> str:
    """Heading of a class's flags, such as "Private server options" for PrivateServerSettings."""
    words = re.findall(r"[A-Z]+[^A-Z]*", settings_class.__name__.removesuffix("Settings"))
    return settings_class.model_config.get("title") or f"{' '.join(words).capitalize()} options"


def _help(field: SettingField) -> str:
    facts = [f"env: {', '.join((field.variable, *field.other_variables))}"]
    if field.is_required:
        facts.append("required")
    elif field.default is not None:
        facts.append(f"default: {field.default}")
    return f"{field.description}  [{'; '.join(facts)}]"
