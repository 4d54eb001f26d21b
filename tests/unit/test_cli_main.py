"""What a user of the command line sees: verbs, help, exit codes, and one paragraph for whatever goes wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
from pydantic import BaseModel, Field

from kv_transfer.errors import PoolUnavailable
from splitwise_sched.cli import verbs
from splitwise_sched.cli.main import main
from splitwise_sched.cli.options import settings_command
from splitwise_sched.errors import ConfigError, QueueFull


class ToySettings(BaseModel):
    num_things: int = Field(3, ge=1, description="How many things.")
    loud: bool = Field(False, description="Say it loudly.")


class OtherError(Exception):
    """An error of a package that knows nothing of this command line."""

    exit_code = 7


@settings_command(ToySettings, name="toy")
@click.option("--raise", "failure", default="")
def toy(settings: ToySettings, failure: str) -> int:
    """Play with things."""
    failures: dict[str, BaseException] = {
        "config": ConfigError("this\n  cannot   work: do that"),
        "runtime": QueueFull(5, 5, 1.0),
        "other": OtherError("the other side left: start it again"),
        "interrupt": KeyboardInterrupt(),
        "transfer": PoolUnavailable(1 << 50, "out of memory"),
        "bug": ZeroDivisionError("division by zero"),
        "torch": ModuleNotFoundError("No module named 'torch'", name="torch"),
        "uvicorn": ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn"),
    }
    if failure:
        raise failures[failure]
    print(settings.num_things, settings.loud)
    return settings.num_things if settings.loud else 0


not_a_command = object()


@pytest.fixture(autouse=True)
def toy_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line with verbs of this module's."""
    here = __name__
    entries = [
        EntryPoint("toy", f"{here}:toy", verbs.GROUP),
        EntryPoint("gateway", f"{here}:toy", verbs.GROUP),
        EntryPoint("broken", f"{here}:missing_name", verbs.GROUP),
        EntryPoint("wrong", f"{here}:not_a_command", verbs.GROUP),
        EntryPoint("serve", "prometheus_client_is_not_here:x", verbs.GROUP),
    ]
    monkeypatch.setattr(verbs, "entry_points", lambda group: entries)
    monkeypatch.setattr(signal, "signal", lambda *args: None)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(args)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_verb_gets_its_settings_and_gives_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "toy") == (0, "3 False\n", "")
    assert run(capsys, "toy", "--num-things", "5", "--loud") == (5, "5 True\n", "")


def test_environment_and_files_reach_a_verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "toy.env"
    path.write_text("SPLITWISE_NUM_THINGS=8\nSPLITWISE_LOUD=true\n")
    monkeypatch.setenv("SPLITWISE_NUM_THINGS", "9")
    assert run(capsys, "toy", "--config", str(path), "--no-loud") == (0, "9 False\n", "")


def test_help_shows_types_defaults_and_environment(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "toy", "--help")
    text = " ".join(out.split())
    assert code == 0
    assert "Toy options: --num-things INTEGER How many things. [env: SPLITWISE_NUM_THINGS; default: 3]" in text
    assert "--loud / --no-loud" in text and "--config FILE" in text and "Play with things." in text


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out.startswith("splitwise-sched ")


def test_the_list_of_verbs_loads_what_it_can_and_says_what_the_others_need(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    text = " ".join(out.split())
    assert code == 0
    assert "toy Play with things." in text
    assert "serve (serve needs more: the Python module 'prometheus_client_is_not_here' is not installed" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tyo"], "'tyo' is not a command: did you mean 'toy'?"),
        (["something-else"], "'something-else' is not a command: there are broken, gateway, serve, toy, wrong"),
        (["toy", "--num-thing", "1"], "--num-things"),
        (["toy", "--num-things", "0"], "--num-things is '0': it must be a whole number of at least 1"),
        (["toy", "--num-things"], "requires an argument"),
        (["toy", "extra"], "unexpected extra argument"),
        (["toy", "--raise", "config"], "error: this cannot work: do that\n"),
        (["toy", "--raise", "torch"], "pip install 'splitwise-sched[engine]'"),
        (["gateway", "--raise", "uvicorn"], "pip install 'splitwise-sched[gateway]'"),
        (["broken"], "cannot be loaded"),
        (["wrong"], "is not a click command but <object"),
        (["serve"], "is not installed: pip install prometheus-client-is-not-here"),
    ],
)
def test_wrong_usage_is_one_paragraph_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        ("runtime", 1, "error: the queue holds 5 requests"),
        ("other", 7, "error: the other side left: start it again\n"),
        ("transfer", 1, "error: cannot allocate a KV pool"),
        ("bug", 1, "error: ZeroDivisionError: division by zero (at "),
        ("interrupt", 130, ""),
    ],
)
def test_failures_have_their_exit_codes_and_no_traceback(
    capsys: pytest.CaptureFixture[str], failure: str, code: int, message: str
) -> None:
    actual, _, err = run(capsys, "toy", "--raise", failure)
    assert actual == code and message in err and "Traceback" not in err


def test_debug_variable_brings_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITWISE_DEBUG", "1")
    _, _, err = run(capsys, "toy", "--raise", "bug")
    assert "Traceback" in err and "error: ZeroDivisionError" in err


def test_two_settings_of_one_name_are_a_bug_that_is_noticed() -> None:
    class Twin(BaseModel):
        loud: int = 1

    with pytest.raises(AssertionError, match="loud"):
        settings_command(ToySettings, Twin, name="twin")


def test_the_command_line_alone_imports_neither_torch_nor_an_engine() -> None:
    code = "import sys, splitwise_sched.cli.main as m; m.main(['--version']); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.splitlines()[-1] == "False"
