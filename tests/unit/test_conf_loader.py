"""Where settings come from, which source wins, and what a user is told about a value that cannot be."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator

from splitwise_sched.configuration import load, read_env_file
from splitwise_sched.errors import ConfigError, InvalidRequest
from splitwise_sched.setting_fields import setting_fields
from splitwise_sched.settings import SchedulerSettings


class Role(str, Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class Sample(BaseModel, frozen=True, extra="forbid"):
    """One field of every kind that settings classes have."""

    model: str
    role: Role = Role.PREFILL
    engine: Literal["transformers", "vllm"] = "transformers"
    level: Literal[1, 2] = 1
    num_blocks: int = Field(16, ge=1, le=1000)
    ratio: float = Field(0.5, gt=0)
    host: str | None = "here"
    path: Path | None = None
    fast: bool = False
    protocols: tuple[str, ...] = ("ipc", "tcp")
    ports: list[int] = []
    password: SecretStr | None = None
    share: float = Field(1.0, gt=0, le=1)
    name: str = Field("x", max_length=3)

    @field_validator("name")
    @classmethod
    def _not_bad(cls, value: str) -> str:
        if value == "bad":
            raise ValueError("this name is taken: choose another")
        if value == "id":
            raise InvalidRequest("name 'id' is not usable: give letters")
        return value

    @model_validator(mode="after")
    def _fast_needs_blocks(self) -> Sample:
        if self.fast and self.num_blocks < 4:
            raise ValueError("--fast needs --num-blocks 4 or more")
        return self


def one(
    flags: dict[str, Any] | None = None, environ: dict[str, str] | None = None, files: list[Path] | None = None
) -> Sample:
    given = {"model": "m", **(flags or {})}
    (sample,) = load([Sample], flags=given, environ=environ or {}, files=files or [], program="`it`")
    assert isinstance(sample, Sample)
    return sample


def file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_later_files_over_earlier_files_over_defaults(tmp_path: Path) -> None:
    first = file(tmp_path / "1.env", "SPLITWISE_NUM_BLOCKS=1\nSPLITWISE_RATIO=1\nSPLITWISE_HOST=one\nSPLITWISE_NAME=1")
    second = file(tmp_path / "2.env", "SPLITWISE_NUM_BLOCKS=2\nSPLITWISE_RATIO=2\nSPLITWISE_HOST=two")
    environ = {"SPLITWISE_NUM_BLOCKS": "3", "SPLITWISE_RATIO": "3", "OTHER": "x"}
    sample = one({"num_blocks": "4"}, environ, [first, second])
    assert (sample.num_blocks, sample.ratio, sample.host, sample.name) == (4, 3.0, "two", "1")
    assert sample.engine == "transformers"


def test_text_becomes_what_its_field_is() -> None:
    sample = one(
        environ={
            "SPLITWISE_ROLE": "decode",
            "SPLITWISE_LEVEL": "2",
            "SPLITWISE_FAST": "yes",
            "SPLITWISE_PROTOCOLS": "rdma, ipc",
            "SPLITWISE_PORTS": "1,2",
            "SPLITWISE_PATH": "/a/b",
            "SPLITWISE_PASSWORD": "p,q",
        }
    )
    assert sample.role is Role.DECODE and sample.level == 2 and sample.fast is True
    assert sample.protocols == ("rdma", "ipc") and sample.ports == [1, 2] and sample.path == Path("/a/b")
    assert sample.password is not None and sample.password.get_secret_value() == "p,q"


def test_empty_text_means_nothing_where_nothing_is_allowed() -> None:
    sample = one(environ={"SPLITWISE_HOST": "", "SPLITWISE_PASSWORD": "", "SPLITWISE_PROTOCOLS": ""})
    assert (sample.host, sample.password, sample.protocols) == (None, None, ())


def test_settings_that_are_constructed_directly_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SCHEDULER_TOPIC", "SPLITWISE_SCHEDULER_TOPIC"):
        monkeypatch.setenv(name, "from-environment")
    assert SchedulerSettings().scheduler_topic == "default"


def test_several_classes_take_their_own_fields_from_one_set_of_values() -> None:
    class Other(BaseModel, extra="forbid"):
        speed: int = 1

    sample, other = load([Sample, Other], flags={"model": "m", "speed": "7"}, environ={"SPLITWISE_NAME": "abc"})
    assert isinstance(sample, Sample) and isinstance(other, Other)
    assert (sample.name, other.speed) == ("abc", 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_blocks": "many"}, "--num-blocks is 'many': it must be a whole number between 1 and 1000"),
        ({"num_blocks": "0"}, "--num-blocks is '0': it must be a whole number between 1 and 1000"),
        ({"num_blocks": "1.5"}, "--num-blocks is '1.5': it must be a whole number between 1 and 1000"),
        ({"ratio": "0"}, "--ratio is '0': it must be a number above 0"),
        ({"ratio": "half"}, "--ratio is 'half': it must be a number above 0"),
        ({"share": "2"}, "--share is '2': it must be a number above 0 and at most 1"),
        ({"role": "both"}, "--role is 'both': it must be one of prefill, decode"),
        ({"engine": "sglang"}, "--engine is 'sglang': it must be one of transformers, vllm"),
        ({"level": "3"}, "--level is '3': it must be one of 1, 2"),
        ({"fast": "maybe"}, "--fast is 'maybe': it must be true or false"),
        ({"ports": "1,x"}, "--ports is '1,x': it must be a whole number, or several with commas between them"),
        ({"name": "bad"}, "--name is 'bad': this name is taken: choose another"),
        ({"name": "id"}, "--name: name 'id' is not usable: give letters"),
        ({"name": "long"}, "--name is 'long': string should have at most 3 characters"),
        ({"fast": "true", "num_blocks": "2"}, "--fast needs --num-blocks 4 or more"),
        ({"model": None}, "--model is missing: give --model TEXT, or set SPLITWISE_MODEL"),
        ({"num_blocks": "x", "ratio": "y"}, "1000; --ratio is 'y'"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_flag_and_what_would_do(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        one(flags)
    assert message in str(refused.value)


def test_a_wrong_value_is_traced_to_the_environment_or_to_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^environment variable SPLITWISE_NUM_BLOCKS is 'x'"):
        one(environ={"SPLITWISE_NUM_BLOCKS": "x"})
    path = file(tmp_path / "a.env", "# a comment\n\nSPLITWISE_NUM_BLOCKS=x\n")
    with pytest.raises(ConfigError, match=r"^SPLITWISE_NUM_BLOCKS \(.*/a\.env, line 3\) is 'x'"):
        one(files=[path])


def test_a_secret_is_never_repeated_in_an_error() -> None:
    class Strict(BaseModel):
        password: SecretStr = Field(SecretStr(""), max_length=3)

    with pytest.raises(ConfigError) as refused:
        load([Strict], flags={"password": "hunter2"}, environ={})
    assert "hunter2" not in str(refused.value) and "--password" in str(refused.value)


def test_an_overlong_value_is_cut_in_its_error() -> None:
    with pytest.raises(ConfigError) as refused:
        one({"num_blocks": "9" * 100_000})
    assert len(str(refused.value)) < 500


def test_a_file_is_quoted_and_commented_like_shell(tmp_path: Path) -> None:
    text = "A=1 # one\n  # nothing\nexport B='two words'\n\nC=\"it's\"\nD=\nE=a=b\nF='a #'b#c #it's\n"
    entries = [(e.key, e.value, e.line) for e in read_env_file(file(tmp_path / "f.env", text))]
    assert entries == [
        ("A", "1", 1), ("B", "two words", 3), ("C", "it's", 5), ("D", "", 6), ("E", "a=b", 7), ("F", "a #b#c", 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"SPLITWISE_NUM_BLOKS=1", "line 1: SPLITWISE_NUM_BLOKS is not a setting of `it`: did you mean SPLITWISE_NUM"),
        (b"\nNUM_BLOCKS=1", "line 2: NUM_BLOCKS is not a setting of `it`: did you mean SPLITWISE_NUM_BLOCKS?"),
        (b"CUDA_VISIBLE_DEVICES=1", "CUDA_VISIBLE_DEVICES is not a setting of `it`: see --help"),
        (b"SPLITWISE_NAME=a\nSPLITWISE_NAME=b", "line 2: SPLITWISE_NAME was set before in this file"),
        (b"SPLITWISE_NAME = a", "line 1: 'SPLITWISE_NAME = a' is not KEY=VALUE"),
        (b"SPLITWISE_NAME=a b", "quote a value with blanks"),
        (b"SPLITWISE_NAME", "is not KEY=VALUE"),
        (b"=a", "is not KEY=VALUE"),
        (b"SPLITWISE_NAME='a", "No closing quotation"),
        (b"SPLITWISE_NAME=\xff", "is not UTF-8 text"),
        (b"#" * (1 << 20) + b"##", "is larger than"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_settings_is_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "f.env"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        one(files=[path])
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        one(files=[tmp_path / "missing.env"])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        one(files=[tmp_path])


def test_help_words_follow_from_the_class() -> None:
    fields = {field.name: field for field in setting_fields(Sample)}
    assert [fields[n].metavar for n in ("role", "num_blocks", "ratio", "path", "protocols", "ports")] == [
        "prefill|decode", "INTEGER", "NUMBER", "PATH", "TEXT,...", "INTEGER,...",
    ]  # fmt: skip
    assert fields["role"].default == "prefill" and fields["protocols"].default == "ipc,tcp"
    assert fields["password"].is_secret and fields["password"].default is None
    assert fields["model"].is_required and fields["host"].is_optional and fields["fast"].is_bool


def test_a_field_that_begins_with_the_prefix_has_it_once_in_its_variable() -> None:
    class Instance(BaseModel):
        splitwise_role: Role = Role.PREFILL

    (field,) = setting_fields(Instance)
    assert (field.flag, field.variable) == ("--splitwise-role", "SPLITWISE_ROLE")
