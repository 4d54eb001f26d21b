"""The verbs of ``splitwise-sched``: entry points of installed packages, imported when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from typing import Any

import click

from splitwise_sched.errors import ConfigError

GROUP = "splitwise_sched.commands"
DISTRIBUTION = "splitwise-sched"
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)[^;]*;?(.*)")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


class Verbs(click.Group):
    """A group whose commands are the entry points of ``splitwise_sched.commands``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({entry.name for entry in entry_points(group=GROUP)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Raises ConfigError when the verb exists but what it needs is not installed."""
        for entry in entry_points(group=GROUP):
            if entry.name == cmd_name:
                return _load(entry)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in self.list_commands(ctx):
            close = get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"{name!r} is not a command: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as exc:
            # Verbs import what is heavy only when they run.
            if exc.name is None:
                raise
            raise ConfigError(explain_missing_module(exc.name, ctx.invoked_subcommand)) from exc

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            try:
                command = self.get_command(ctx, name)
                rows.append((name, command.get_short_help_str(limit=100) if command is not None else ""))
            except ConfigError as exc:
                rows.append((name, f"({exc})"))
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def explain_missing_module(module: str, verb: str | None = None) -> str:
    """Why ``module`` is not there, and which pip install brings it; an extra of the verb's name is preferred."""
    root = module.partition(".")[0]
    if root != module and find_spec(root) is not None:
        return f"the Python module {module!r} is missing from the installed {root!r}: that installation is not whole"
    extras = list(_extras_that_require(root))
    if not extras:
        return f"the Python module {root!r} is not installed: pip install {root.replace('_', '-')}"
    extra = verb if verb in extras else extras[0]
    return f"the Python module {root!r} is not installed: pip install '{DISTRIBUTION}[{extra}]'"


def _load(entry: EntryPoint) -> click.Command:
    try:
        command: Any = entry.load()
    except ModuleNotFoundError as exc:
        raise ConfigError(f"{entry.name} needs more: {explain_missing_module(exc.name or '?', entry.name)}") from exc
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"{entry.name} cannot be loaded from {entry.value}: {exc}") from exc
    if not isinstance(command, click.Command):
        raise ConfigError(f"{entry.name}: {entry.value} is not a click command but {command!r}")
    return command


def _extras_that_require(module: str) -> Iterator[str]:
    """Extras of this package that ask for a distribution of the module's name."""
    try:
        requirements = distribution(DISTRIBUTION).requires or []
    except PackageNotFoundError:
        return
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        extra = _EXTRA.search(match[2]) if match is not None else None
        if match is not None and extra is not None and _normal(match[1]) == _normal(module):
            yield extra[1]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
