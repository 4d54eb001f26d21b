"""The configuration that FastDeploy's engine builds for its splitwise scheduler, with its names and defaults."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr, ValidationError

from splitwise_sched.errors import ConfigError
from splitwise_sched.fastdeploy.admission import ChunkedPrefill
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import check_id

logger = logging.getLogger(__name__)

LONG_PREFILL_PART = 0.04
MIN_LEASE_S = 0.3

_POLLING = "nothing is polled or rewritten periodically here"
_ONE_CONNECTION = "one connection carries everything that is due at a time"
_IN_REDIS = "the decode instance is chosen in Redis, from the KV that is reserved there"
WITHOUT_EFFECT: Mapping[str, tuple[float, str]] = {
    "sync_period": (5, _POLLING),
    "clear_expired_nodes_period": (60, "lapsed leases are found and cleared every few hundred milliseconds"),
    "reader_parallel": (4, _ONE_CONNECTION),
    "writer_parallel": (4, _ONE_CONNECTION),
    "reader_batch_size": (200, _ONE_CONNECTION),
    "writer_batch_size": (200, _ONE_CONNECTION),
    "min_load_score": (3, _IN_REDIS),
    "load_shards_num": (1, _IN_REDIS),
}


class SplitWiseSchedulerConfig:
    """Options of a scheduler; units as in FastDeploy. docs/fastdeploy.md says what each does here.

    Args:
        nodeid: name of this instance and front end; a random one when None.
        host: Redis or Valkey; None finds or starts this user's private server.
        ttl: seconds until a request expires.
        release_load_expire_period: seconds after which a request of which the engine has told nothing is taken from
            it and run elsewhere.
        expire_period: milliseconds after which an instance that shows no life is dead to the others.
        max_size: requests queued or in prefill, at most, before more are refused; -1 for no limit.
        enable_chunked_prefill: admit by the three caps that follow, not by ``max_num_batched_tokens``.
        long_prefill_token_threshold: 0 or None for 4 % of ``max_model_len``.
        model: instances and requests of a topic have the same one.
        kv_capacity_tokens: KV that placement may reserve on this instance. The interface has no place to tell the
            pool's size, so that the default only balances; an engine refuses what it has no blocks for.
        request_class, output_class: what ``get_requests`` and ``get_results`` build, by ``from_dict``.
        decode_gets_requests: ``get_requests`` also hands out requests on a decode instance. FastDeploy's does not:
            there prefill sends them to decode itself.
        others: more of FastDeploy's options; all are accepted and left alone.

    Raises:
        ConfigError: an option cannot work, with its value.
    """

    def __init__(  # noqa: PLR0917 - their order
        self,
        nodeid: str | None = None,
        host: str | None = "127.0.0.1",
        port: int = 6379,
        password: str | None = None,
        topic: str = "fd",
        ttl: float = 900,
        release_load_expire_period: float = 600,
        sync_period: float = 5,
        expire_period: float = 3000,
        clear_expired_nodes_period: float = 60,
        reader_parallel: int = 4,
        reader_batch_size: int = 200,
        writer_parallel: int = 4,
        writer_batch_size: int = 200,
        *,
        db: int = 0,
        username: str | None = None,
        max_size: int = -1,
        min_load_score: float = 3,
        load_shards_num: int = 1,
        max_model_len: int | None = None,
        enable_chunked_prefill: bool | None = False,
        max_num_partial_prefills: int | None = 1,
        max_long_partial_prefills: int | None = 1,
        long_prefill_token_threshold: int | None = 0,
        model: str = "fastdeploy",
        kv_capacity_tokens: int = 1 << 24,
        request_class: Any = None,
        output_class: Any = None,
        decode_gets_requests: bool = False,
        **others: Any,
    ) -> None:
        self.nodeid = str(uuid.uuid4()) if nodeid is None else nodeid
        self.redis_host = host
        self.redis_port = port
        self.redis_db = db
        self.redis_username = username
        self.redis_password = password
        self.redis_topic = topic
        self.ttl = ttl
        self.release_load_expire_period = release_load_expire_period
        self.sync_period = sync_period
        self.expire_period = expire_period / 1000.0
        self.clear_expired_nodes_period = clear_expired_nodes_period
        self.reader_parallel = reader_parallel
        self.reader_batch_size = reader_batch_size
        self.writer_parallel = writer_parallel
        self.writer_batch_size = writer_batch_size
        self.max_size = max_size
        self.min_load_score = min_load_score
        self.load_shards_num = load_shards_num
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.max_num_partial_prefills = max_num_partial_prefills
        self.max_long_partial_prefills = max_long_partial_prefills
        self.long_prefill_token_threshold = long_prefill_token_threshold
        if not long_prefill_token_threshold and max_model_len is not None:
            self.long_prefill_token_threshold = int(max_model_len * LONG_PREFILL_PART)
        self.model = model
        self.kv_capacity_tokens = kv_capacity_tokens
        self.request_class = request_class
        self.output_class = output_class
        self.decode_gets_requests = decode_gets_requests
        self.others = others
        self.check()
        self._warn()

    def check(self) -> None:
        """Raises ConfigError for options that cannot work, alone or together."""
        check_id("node", self.nodeid)
        self.settings()
        self.chunked_prefill()
        for name, least in (("release_load_expire_period", 1), ("kv_capacity_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be {least} or more")
        for name in ("request_class", "output_class"):
            given = getattr(self, name)
            if given is not None and not callable(getattr(given, "from_dict", None)):
                raise ConfigError(f"{name} is {given!r}: it must be a class with from_dict(dict)")

    def print(self) -> None:
        """Log every option but the password."""
        logger.info("splitwise scheduler:")
        for name, value in vars(self).items():
            logger.info("  %-28s %s", name, "***" if name == "redis_password" and value else value)

    def settings(self) -> SchedulerSettings:
        """These options in this scheduler's own terms. Raises ConfigError."""
        try:
            return SchedulerSettings(
                scheduler_host=self.redis_host,
                scheduler_port=self.redis_port,
                scheduler_db=self.redis_db,
                scheduler_username=self.redis_username,
                scheduler_password=None if self.redis_password is None else SecretStr(self.redis_password),
                scheduler_topic=self.redis_topic,
                scheduler_ttl=self.ttl,
                scheduler_max_size=self.max_size,
                instance_lease_s=max(MIN_LEASE_S, self.expire_period),
            )
        except ValidationError as exc:
            first = exc.errors()[0]
            raise ConfigError(f"{first['loc'][0]} is {first['input']!r}: {first['msg']}") from exc

    def chunked_prefill(self) -> ChunkedPrefill | None:
        """The caps, None when the engine does not compute in chunks. Raises ConfigError."""
        if not self.enable_chunked_prefill:
            return None
        names = ("max_num_partial_prefills", "max_long_partial_prefills", "long_prefill_token_threshold")
        for name in names:
            value = getattr(self, name)
            if not value or value < 1:
                hint = " (or max_model_len given)" if name == names[-1] else ""
                raise ConfigError(f"{name} is {value!r}: with chunked prefill it must be 1 or more{hint}")
        return ChunkedPrefill(*(getattr(self, name) for name in names))

    def _warn(self) -> None:
        changed = {name: why for name, (default, why) in WITHOUT_EFFECT.items() if getattr(self, name) != default}
        for name, why in changed.items():
            logger.warning("%s=%r has no effect: %s", name, getattr(self, name), why)
