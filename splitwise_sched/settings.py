"""How a process finds and uses its topic. Frozen; built by whoever embeds the library, or by the command line."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from splitwise_sched.types import CLASS_PATTERN, check_id


class ExplicitSettings(BaseSettings):
    """Settings that take what they are given and read no environment; the command line's loader does that."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class SchedulerSettings(ExplicitSettings):
    """The control plane's settings, the same for front ends and instances."""

    scheduler_name: Literal["splitwise"] = Field(
        default="splitwise", description="Scheduler to use; there is this one."
    )
    scheduler_host: str | None = Field(
        default=None,
        description="Redis or Valkey host, or the path of its unix socket. Left out: this user's private server is "
        "found, or started.",
    )
    scheduler_port: int = Field(default=6379, ge=1, le=65535, description="Port of the Redis or Valkey server.")
    scheduler_db: int = Field(default=0, ge=0, le=1023, description="Redis database number.")
    scheduler_username: str | None = Field(default=None, description="ACL user.")
    scheduler_password: SecretStr | None = Field(default=None, description="Password of the server or ACL user.")
    scheduler_topic: str = Field(default="default", description="Instances and front ends of one topic serve together.")
    scheduler_ttl: float = Field(
        default=900.0,
        gt=0,
        le=86400,
        description="Seconds until a request expires; its record stays as long again.",
    )
    scheduler_max_size: int = Field(
        default=10_000,
        ge=-1,
        description="Requests queued or in prefill, at most, before submit is refused; -1: no limit.",
    )
    priority_classes: tuple[str, ...] = Field(
        default=("interactive:8", "default:4", "batch:1"),
        description="Classes of service and their weights, when prefill is short; the same for all of a topic.",
    )
    preferred_wait_ms: int = Field(
        default=200,
        ge=0,
        le=60_000,
        description="How long a request waits for an instance that it prefers.",
    )
    scheduler_max_attempts: int = Field(
        default=5, ge=1, le=100, description="Times a request is started before it goes to the dead letter."
    )
    num_reserved_decode_tokens: int = Field(
        default=512,
        ge=1,
        description="Output tokens for which decode KV is reserved at placement; more comes as it grows.",
    )
    instance_lease_s: float = Field(
        default=3.0,
        ge=0.3,
        le=300,
        description="An instance that has not renewed its lease for so long is dead to the others.",
    )
    frontend_lease_s: float = Field(default=10.0, ge=1, le=600, description="The same for a front end.")
    redis_timeout_s: float = Field(
        default=10.0, gt=0, le=300, description="How long a command is retried while Redis cannot be reached."
    )

    @field_validator("priority_classes")
    @classmethod
    def _classes_have_weights(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            name, _, weight = item.partition(":")
            if not CLASS_PATTERN.fullmatch(name) or not weight.isdigit() or not 1 <= int(weight) <= 1000:
                raise ValueError(f"{item!r} is no class: give name:weight with a weight from 1 to 1000")
        if not any(item.startswith("default:") for item in value):
            raise ValueError("there is no class named default, which requests without a priority are in: add one")
        return value

    @property
    def class_weights(self) -> dict[str, int]:
        return {name: int(weight) for name, _, weight in (item.partition(":") for item in self.priority_classes)}

    @field_validator("scheduler_topic")
    @classmethod
    def _topic_is_an_id(cls, value: str) -> str:
        return check_id("topic", value)
