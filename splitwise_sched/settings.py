"""How a process finds and uses its topic. Frozen; built by whoever embeds the library, or by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from splitwise_sched.types import CLASS_PATTERN, MAX_TIMEOUT_S, check_id

MAX_SHARDS = 256


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


class ServerSettings(ExplicitSettings):
    """Which Redis or Valkey it is, and how to get in: one server, Sentinels that know the master, or a Cluster."""

    scheduler_host: str | None = Field(
        default=None,
        description="Redis or Valkey host, or the path of its unix socket. Left out, and without Sentinels or Cluster: "
        "this user's private server is found, or started.",
    )
    scheduler_port: int = Field(default=6379, ge=1, le=65535, description="Port of the Redis or Valkey server.")
    scheduler_db: int = Field(default=0, ge=0, le=1023, description="Redis database number.")
    scheduler_username: str | None = Field(default=None, description="ACL user.")
    scheduler_password: SecretStr | None = Field(default=None, description="Password of the server or ACL user.")
    scheduler_tls: bool = Field(default=False, description="Speak TLS (rediss) with the server, Sentinels included.")
    scheduler_tls_ca: Path | None = Field(
        default=None, description="File with the CA that signed the server's certificate. Left out: the system's CAs."
    )
    scheduler_tls_cert: Path | None = Field(
        default=None, description="File with this client's certificate, for a server that asks for one."
    )
    scheduler_tls_key: Path | None = Field(default=None, description="File with the key of that certificate.")
    scheduler_tls_check_hostname: bool = Field(
        default=True, description="The server's certificate must be for the host that is spoken to."
    )
    scheduler_sentinels: tuple[str, ...] = Field(
        default=(), description="Sentinels, as host:port; they are asked for the master, instead of --scheduler-host."
    )
    scheduler_sentinel_service: str | None = Field(
        default=None, description="Name under which the Sentinels watch the master."
    )
    scheduler_sentinel_username: str | None = Field(default=None, description="ACL user on the Sentinels.")
    scheduler_sentinel_password: SecretStr | None = Field(default=None, description="Password of the Sentinels.")
    scheduler_cluster_nodes: tuple[str, ...] = Field(
        default=(), description="Some nodes of a Redis Cluster, as host:port, instead of --scheduler-host."
    )
    redis_timeout_s: float = Field(
        default=10.0, gt=0, le=300, description="How long a command is retried while Redis cannot be reached."
    )
    durability: Literal["master", "wait"] = Field(
        default="master",
        description="When a request counts as submitted: when the master has it, or when a replica has it too (WAIT).",
    )
    durability_timeout_ms: int = Field(
        default=500, ge=1, le=60_000, description="How long --durability wait waits for a replica."
    )

    @property
    def names_a_server(self) -> bool:
        """Otherwise the private one is meant."""
        return bool(self.scheduler_host or self.scheduler_sentinels or self.scheduler_cluster_nodes)

    @field_validator("scheduler_host")
    @classmethod
    def _host_is_no_url(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError(
                "it is a URL: give the host alone, and the rest with --scheduler-port, --scheduler-db, "
                "--scheduler-username, --scheduler-password and --scheduler-tls"
            )
        return value

    @field_validator("scheduler_sentinels", "scheduler_cluster_nodes")
    @classmethod
    def _addresses_have_ports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            split_address(text)
        return value

    @model_validator(mode="after")
    def _servers_are_named_once(self) -> ServerSettings:
        named = {
            "--scheduler-host": self.scheduler_host,
            "--scheduler-sentinels": self.scheduler_sentinels,
            "--scheduler-cluster-nodes": self.scheduler_cluster_nodes,
        }
        given = [flag for flag, value in named.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: a topic is on one of them")
        if self.scheduler_sentinels and not self.scheduler_sentinel_service:
            raise ValueError(
                "--scheduler-sentinels are given without --scheduler-sentinel-service: name what they watch, as in "
                "their `sentinel monitor NAME ...`"
            )
        if self.scheduler_cluster_nodes and self.scheduler_db:
            raise ValueError(f"--scheduler-db is {self.scheduler_db}: a Cluster has database 0 alone")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServerSettings:
        files = {
            "--scheduler-tls-ca": self.scheduler_tls_ca,
            "--scheduler-tls-cert": self.scheduler_tls_cert,
            "--scheduler-tls-key": self.scheduler_tls_key,
        }
        given = [flag for flag, path in files.items() if path is not None]
        if given and not self.scheduler_tls:
            raise ValueError(f"{' and '.join(given)} given without --scheduler-tls: add it, or leave them out")
        if (self.scheduler_tls_cert is None) != (self.scheduler_tls_key is None):
            raise ValueError("--scheduler-tls-cert and --scheduler-tls-key go together: give both, or neither")
        if self.scheduler_tls and (self.scheduler_host or "").startswith("/"):
            raise ValueError("--scheduler-tls is given for a unix socket, which has none: leave it out")
        return self


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port". Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 1 <= int(port) <= 65535 or "/" in host:
        raise ValueError(f"{text!r} is no address: give host:port, such as redis-1.internal:6379")
    return host.removeprefix("[").removesuffix("]"), int(port)


class SchedulerSettings(ServerSettings):
    """The control plane's settings, the same for front ends and instances."""

    scheduler_name: Literal["splitwise"] = Field(
        default="splitwise", description="Scheduler to use; there is this one."
    )
    scheduler_topic: str = Field(default="default", description="Instances and front ends of one topic serve together.")
    scheduler_shards: int = Field(
        default=1,
        ge=1,
        le=MAX_SHARDS,
        description="Parts of the topic, each a cell of instances whose pairs are made within it; equal in all "
        "processes of a topic. With a Cluster, they lie on its nodes.",
    )
    scheduler_shard: int | None = Field(
        default=None,
        ge=0,
        lt=MAX_SHARDS,
        description="Shard that this instance serves. Left out: it chooses one that has need of it.",
    )
    scheduler_ttl: float = Field(
        default=900.0,
        gt=0,
        le=MAX_TIMEOUT_S,
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
        default=2.0,
        ge=0.3,
        le=300,
        description="An instance that has not renewed its lease for so long is dead to the others.",
    )
    frontend_lease_s: float = Field(default=10.0, ge=1, le=600, description="The same for a front end.")

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

    @model_validator(mode="after")
    def _shard_exists(self) -> SchedulerSettings:
        if self.scheduler_shard is not None and self.scheduler_shard >= self.scheduler_shards:
            raise ValueError(
                f"--scheduler-shard is {self.scheduler_shard}, but --scheduler-shards is {self.scheduler_shards}: "
                f"shards are 0 to {self.scheduler_shards - 1}"
            )
        return self

    @field_validator("scheduler_topic")
    @classmethod
    def _topic_is_an_id(cls, value: str) -> str:
        return check_id("topic", value)
