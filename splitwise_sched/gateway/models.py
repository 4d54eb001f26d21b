"""Which models the live instances serve, and the tokenizers for them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from splitwise_sched.errors import ConfigError, UnknownModel
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.gateway.errors import ApiError, unavailable
from splitwise_sched.records import InstanceRecord
from splitwise_sched.shards import INSTANCES_CACHE_S
from splitwise_sched.tokenizer import Tokenizer
from splitwise_sched.types import Role

PREFILL_ROLES = (Role.PREFILL, Role.MIXED)
DECODE_ROLES = (Role.DECODE, Role.MIXED)
LOOK_AGAIN_S = 0.1
MAX_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class ServedModel:
    """
    Attributes:
        max_model_len: prompt and output tokens together, on every instance that may get the request.
    """

    name: str
    max_model_len: int
    tokenizer: Tokenizer


def missing_roles(shards: Sequence[Sequence[InstanceRecord]]) -> list[str]:
    """Kinds of instances that must be there to answer a request, and are not, in the shard that lacks the least."""
    wanted = (("prefill", PREFILL_ROLES), ("decode", DECODE_ROLES))
    present = [{record.role for record in records} for records in shards]
    lacking = ([name for name, capable in wanted if roles.isdisjoint(capable)] for roles in present)
    return min(lacking, key=len)


def limits(records: Sequence[InstanceRecord]) -> dict[str, int]:
    """Names of the served models, and the least ``max_model_len`` of each."""
    found: dict[str, int] = {}
    for record in records:
        found[record.model] = min(record.max_model_len, found.get(record.model, record.max_model_len))
    return dict(sorted(found.items()))


class ServedModels:
    """Finds models by name.

    Args:
        tokenizer: that of every model, whatever the instances name.
    """

    def __init__(self, frontend: FrontEnd, tokenizer: Tokenizer | None) -> None:
        self._frontend = frontend
        self._given = tokenizer
        self._tokenizers: dict[str, Tokenizer] = {}
        self._served_at: dict[str, float] = {}
        # A failover of Redis takes longer than a lease, and so does the restart of an instance.
        self._patience_s = 2 + 2 * frontend.settings.instance_lease_s
        self._loading = asyncio.Lock()

    async def find(self, name: str) -> ServedModel:
        """Waits a while for one that was served a moment ago: its instances may just be registering again.

        Raises:
            UnknownModel: no instance has it.
            ApiError: 503 when a kind of instance is missing, or its tokenizer
                cannot be read here.
            StoreUnavailable: nobody knows.
        """
        with contextlib.suppress(ApiError, UnknownModel):
            return self._seen(await self._find(name))
        while True:
            try:
                # Nobody is refused for what was true a moment ago.
                return self._seen(await self._find(name, max_age_s=0))
            except (ApiError, UnknownModel):
                if time.monotonic() - self._served_at.get(name, float("-inf")) > self._patience_s:
                    raise
                await asyncio.sleep(LOOK_AGAIN_S)

    def _seen(self, served: ServedModel) -> ServedModel:
        if len(self._served_at) < MAX_REMEMBERED or served.name in self._served_at:
            self._served_at[served.name] = time.monotonic()
        return served

    async def _find(self, name: str, max_age_s: float = INSTANCES_CACHE_S) -> ServedModel:
        shards = await self._frontend.instances_by_shard(max_age_s)
        records = [record for shard in shards for record in shard]
        topic = self._frontend.settings.scheduler_topic
        if not records:
            raise unavailable(
                f"no instance is live on topic {topic!r}: start some with `splitwise-sched serve`", "no_instance"
            )
        served = limits(records)
        if name not in served:
            raise UnknownModel(name, list(served))
        of_model = [record for record in records if record.model == name]
        missing = missing_roles([[record for record in shard if record.model == name] for shard in shards])
        if missing:
            raise unavailable(
                f"no {' and no '.join(missing)} instance of model {name!r} is live on topic {topic!r}: start one with "
                "`splitwise-sched serve --role ...`",
                "no_instance",
            )
        return ServedModel(name, served[name], await self._tokenizer(of_model))

    async def _tokenizer(self, records: Sequence[InstanceRecord]) -> Tokenizer:
        if self._given is not None:
            return self._given
        paths = sorted({record.tokenizer for record in records} - {""})
        for path in paths:
            if path in self._tokenizers:
                return self._tokenizers[path]
        reason = "its instances name none"
        async with self._loading:
            for path in paths:
                try:
                    self._tokenizers[path] = await asyncio.to_thread(Tokenizer.from_pretrained_dir, path)
                    return self._tokenizers[path]
                except ConfigError as exc:
                    reason = str(exc)
        raise unavailable(
            f"model {records[0].model!r} is served, but the gateway cannot read its tokenizer ({reason}): start the "
            "gateway with --model PATH, a directory that holds its tokenizer.json",
            "no_tokenizer",
        )
