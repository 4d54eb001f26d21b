"""The command ``splitwise-sched``: finds the verb, runs it, and tells its user what went wrong in one paragraph.

An exception is for the user, and ``str()`` of it that paragraph, when it is a SplitwiseError or its class has an
``exit_code``; so that packages which know nothing of this one can have errors for users too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from splitwise_sched.cli.verbs import DISTRIBUTION, Verbs
from splitwise_sched.errors import ConfigError, InvalidRequest, SplitwiseError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
DEBUG_VARIABLE = "SPLITWISE_DEBUG"


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name=DISTRIBUTION, message="%(prog)s %(version)s")
def cli() -> None:
    """Prefill/decode disaggregated LLM inference, scheduled through Redis."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (failed), 2 (wrong usage or settings) or 130 (Ctrl-C).

    SIGTERM unwinds like Ctrl-C, with exit code 143, unless the verb handles it itself.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        result = cli.main(args=None if args is None else list(args), prog_name="splitwise-sched", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except Exception as exc:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            traceback.print_exc()
        print(f"error: {' '.join(_paragraph(exc).split())}", file=sys.stderr)
        return _exit_code(exc)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _exit_code(exc: Exception) -> int:
    if isinstance(exc, ConfigError | InvalidRequest):
        return EXIT_USAGE
    code = getattr(type(exc), "exit_code", None)
    return code if isinstance(code, int) else EXIT_FAILURE


def _paragraph(exc: Exception) -> str:
    if isinstance(exc, click.UsageError):
        command = exc.ctx.command_path if exc.ctx is not None else "splitwise-sched"
        return f"{exc.format_message()} (`{command} --help` lists what there is)"
    if isinstance(exc, click.ClickException):
        return exc.format_message()
    if isinstance(exc, SplitwiseError) or isinstance(getattr(type(exc), "exit_code", None), int):
        return str(exc)
    where = traceback.extract_tb(exc.__traceback__)[-1]
    return (
        f"{type(exc).__name__}: {exc} (at {where.filename}:{where.lineno}). This is not an error that was foreseen; "
        f"{DEBUG_VARIABLE}=1 shows the whole traceback"
    )
