"""The gateway's own settings; those of the control plane are SchedulerSettings."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from splitwise_sched.settings import ExplicitSettings
from splitwise_sched.types import MAX_TIMEOUT_S


class GatewaySettings(ExplicitSettings):
    """Where the gateway listens, and what it takes."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is all of them.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any that is free.")
    model: Path | None = Field(
        None,
        description="Directory with the model's tokenizer. Left out: the one that the instances name, when it can be "
        "read here.",
    )
    api_key: SecretStr | None = Field(
        None, description="Only requests that carry this key are answered; /health and /metrics always are."
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30, description="Largest request body.")
    default_max_tokens: int = Field(
        512,
        ge=1,
        description="Output tokens of a request that does not say; fewer when the model's context is shorter.",
    )
    request_timeout_s: float | None = Field(
        None, gt=0, le=MAX_TIMEOUT_S, description="Seconds from a request to its last token. Left out: --scheduler-ttl."
    )
    shutdown_timeout_s: int = Field(
        10, ge=0, le=3600, description="Seconds that running requests have to finish after Ctrl-C or SIGTERM."
    )
