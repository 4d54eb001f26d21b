"""An instance of a topic on behalf of a ``vllm serve`` that somebody else started, with this project's connector.

It asks the server's health all the time. When nobody answers there, not for as long as a lease lasts either, or the
engine is dead, or one run after the other fails, the instance leaves the topic at once, so that what it held goes on
elsewhere; it waits until the server is back, and joins again under another id.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from engine.vllm.completions import body_of, part_of
from engine.vllm.facts import LOADS_FAILED
from engine.vllm.hosting import local_dir
from engine.vllm.instance import Load, VllmInstance
from engine.vllm.params import InvalidTransferParams, ReceiveParams, parse_params
from engine.vllm.parts import Part, RunFailed, RunRefused, VllmFailed
from engine.vllm.registration import registration_of
from engine.vllm.server import ASK_TIMEOUT_S, ServerBusy, ServerGone, ServerSilent, VllmServer
from engine.vllm.versions import check_version
from kv_transfer.endpoint import RankEndpoint
from splitwise_sched.errors import ConfigError, SplitwiseError, StoreUnavailable
from splitwise_sched.records import Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.tasks import end
from splitwise_sched.types import Request, Role, SamplingParams

logger = logging.getLogger(__name__)

# At most, and four times a lease; a run that fails asks at once.
HEALTH_PERIOD_S = 1.0
FIGURES_PERIOD_S = 1.0
RETRY_S = 1.0
# Runs that failed one after the other, with none that succeeded between them, though the server calls itself well.
MAX_FAILED_IN_A_ROW = 3
PROBE_TIMEOUT_S = 120.0
SEND = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """
    Attributes:
        name: of the instance; its id is this and a boot nonce.
        served_model_name: None: the server's first.
        max_num_seqs: requests that the server runs at a time.
        start_timeout_s: how long to wait for a server that is not there.
        details: further fields of the lease record.
    """

    name: str
    role: Role
    served_model_name: str | None = None
    max_num_seqs: int = 256
    max_waiting_tokens: int = 2048
    start_timeout_s: float = 1800.0
    details: Mapping[str, str] = field(default_factory=dict)


class AttachedVllm(VllmInstance):
    """
    Args:
        server: closed with this.
    """

    def __init__(self, settings: SchedulerSettings, options: AttachOptions, server: VllmServer) -> None:
        super().__init__(settings, options.role, options.max_waiting_tokens)
        self._options = options
        self._server = server
        self._figures: Load = {}
        self._num_loads_failed = 0
        self._endpoints: tuple[RankEndpoint, ...] = ()
        self._is_suspect = False
        self._look = asyncio.Event()
        self._num_failed_in_a_row = 0
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._join(await self._found())
        self._keeper = self._start(self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            await end(self._keeper)
        await super().close()
        await self._server.close()

    def load(self) -> Load:
        return dict(self._figures)

    # ---- the server's life ---------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """As long as the instance lives: in the topic while the server is well, else not."""
        try:
            while True:
                logger.warning("%s leaves the topic: %s", self.instance_id, await self._gone())
                await self._leave()
                if self._draining is not None:
                    self.stop()
                    return
                await self._come_back()
        except SplitwiseError as exc:
            self._end(exc)

    async def _come_back(self) -> None:
        while True:
            registration = await self._found()
            try:
                await self._join(registration)
                logger.info("%s is in the topic, vLLM is back", self.instance_id)
                return
            except StoreUnavailable as exc:
                logger.warning("cannot register yet: %s", exc)
                await asyncio.sleep(RETRY_S)

    async def _gone(self) -> str:
        """Watch the server; returns why it is not to be relied on any more."""
        lease_s = timeout_s = self._settings.instance_lease_s
        figures_at = 0.0
        while True:
            self._look.clear()
            try:
                await self._server.check_health(timeout_s)
                timeout_s, self._is_suspect = lease_s, False
                if self._num_failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                    return f"{self._num_failed_in_a_row} runs failed one after the other, though it calls itself well"
                self._hear()
                self._make_room()
                if time.monotonic() - figures_at >= FIGURES_PERIOD_S:
                    await self._take_figures(lease_s / 2)
                    figures_at = time.monotonic()
            except ServerGone as exc:
                return str(exc)
            except ServerSilent as exc:
                # Its streams may go on; then it is only slow.
                timeout_s = self.heard_at + lease_s - time.monotonic()
                if timeout_s <= 0:
                    return str(exc)
                continue
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._look.wait(), min(HEALTH_PERIOD_S, lease_s / 4))

    def _hear(self) -> None:
        """The server has said something."""
        self.heard_at = time.monotonic()
        self.session.alive(self._figures)

    def _has_room(self) -> bool:
        # What comes now would only fail too.
        return super()._has_room() and not self._is_suspect

    async def _found(self) -> Registration:
        """Wait for the server, and see what it is. Raises SplitwiseError."""
        deadline, said = time.monotonic() + self._options.start_timeout_s, ""
        while True:
            try:
                await self._server.check_health(self._settings.instance_lease_s)
                registration = await self._seen()
                self.heard_at, self._is_suspect, self._num_failed_in_a_row = time.monotonic(), False, 0
                return registration
            except (ServerGone, ServerSilent, RunFailed) as exc:
                if str(exc) != said:
                    said = str(exc)
                    logger.info("waiting for vLLM: %s", said)
            if time.monotonic() > deadline:
                raise VllmFailed(
                    f"vLLM was not ready within {self._options.start_timeout_s:g} s ({said}): start it, see whether "
                    "--vllm-url is its address, or give --vllm-start-timeout-s"
                )
            await asyncio.sleep(RETRY_S)

    async def _seen(self) -> Registration:
        """
        Raises:
            ServerGone, ServerSilent, RunFailed: perhaps later.
            ConfigError: it is not one that can be attached.
        """
        options, url = self._options, self._server.url
        version = await self._server.version()
        check_version(version)
        model = await self._server.served_model(options.served_model_name)
        # What failed before was for others.
        self._num_loads_failed = 1 << 63
        num_engines = await self._take_figures(ASK_TIMEOUT_S)
        if num_engines > 1:
            raise ConfigError(
                f"{url} has {num_engines} data-parallel engines, of which each has KV of its own: start one `vllm "
                "serve` a rank, without --data-parallel-size, and attach each"
            )
        self.model = model.name
        self._endpoints = await self._probed()
        return registration_of(
            self._endpoints,
            name=options.name,
            role=self.role,
            model=model.name,
            max_model_len=model.max_model_len,
            max_num_seqs=options.max_num_seqs,
            details={**options.details, "vllm": version, "vllm_url": url, "tokenizer": local_dir(model.root)},
        )

    async def _probed(self) -> tuple[RankEndpoint, ...]:
        """How the server's ranks are reached: it tells with every prompt that it keeps the KV of, so with this one.

        The block that it keeps is free again after its ``transfer_timeout_s``.
        """
        key = f"probe-{secrets.token_hex(8)}"
        request = Request(key, self.model, (0,), SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
        try:
            part = await self._completed(request, 1, {**SEND, "transfer_id": key}, key, PROBE_TIMEOUT_S)
        except RunRefused as exc:
            raise ConfigError(f"{self._server.url} refuses a prompt of one token: {exc}") from exc
        if not part.token_ids:
            raise ConfigError(f"{self._server.url} answers without token_ids: is it a `vllm serve`?")
        try:
            params = parse_params(part.transfer)
        except InvalidTransferParams as exc:
            raise ConfigError(f"{self._server.url} has a connector that this version does not know: {exc}") from exc
        if not isinstance(params, ReceiveParams):
            raise ConfigError(
                f"{self._server.url} has no SplitwiseConnector: start it with --kv-transfer-config "
                '\'{"kv_connector": "SplitwiseConnector", "kv_role": "kv_both"}\''
            )
        return params.source

    async def _take_figures(self, timeout_s: float) -> int:
        """Returns how many engines the server has; 0 when it does not say, which is no reason to leave it."""
        try:
            figures, num_engines = await self._server.figures(timeout_s)
        except ServerSilent as exc:
            logger.warning("%s", exc)
            return 0
        num_failed = int(figures.pop(LOADS_FAILED, 0))
        self.stats.num_recomputed += max(0, num_failed - self._num_loads_failed)
        self._num_loads_failed = num_failed
        self._figures = figures
        return num_engines

    # ---- runs ----------------------------------------------------------------------------------------------------

    async def _generate(
        self, request: Request, max_tokens: int, transfer: Mapping[str, Any] | None, key: str
    ) -> AsyncGenerator[Part, None]:
        timeout_s = request.timeout_s or self._settings.scheduler_ttl
        try:
            if transfer is not None and transfer.get("do_remote_decode"):
                part = await self._completed(request, max_tokens, transfer, key, timeout_s)
                self._check_sender(part)
                self._num_failed_in_a_row = 0
                self._hear()
                yield part
                return
            async with aclosing(self._streamed(request, max_tokens, transfer, key, timeout_s)) as parts:
                async for part in parts:
                    self._num_failed_in_a_row = 0
                    self._hear()
                    yield part
        except ServerBusy:
            raise
        except RunFailed:
            self._num_failed_in_a_row += 1
            self._is_suspect = True
            self._make_room()
            self._look.set()
            raise

    async def _streamed(
        self, request: Request, max_tokens: int, transfer: Mapping[str, Any] | None, key: str, timeout_s: float
    ) -> AsyncGenerator[Part, None]:
        body = body_of(request, model=self.model, max_tokens=max_tokens, transfer=transfer, key=key, is_streamed=True)
        left, finish = max_tokens, None
        async with aclosing(self._server.stream(body, timeout_s)) as events:
            async for event in events:
                part = part_of(event, has_logprobs=request.sampling.logprobs is not None, limit=left)
                if part is not None and finish is None:
                    left, finish = left - len(part.token_ids), part.finish_reason
                    yield part
        if finish is None:
            raise RunFailed("vLLM ended its stream before its answer")

    async def _completed(
        self, request: Request, max_tokens: int, transfer: Mapping[str, Any], key: str, timeout_s: float
    ) -> Part:
        body = body_of(request, model=self.model, max_tokens=max_tokens, transfer=transfer, key=key, is_streamed=False)
        payload = await self._server.complete(body, timeout_s)
        part = part_of(payload, has_logprobs=request.sampling.logprobs is not None, limit=max_tokens)
        if part is None or part.finish_reason is None:
            raise RunFailed("vLLM's answer has no choice, or no end")
        return part

    def _check_sender(self, part: Part) -> None:
        """Raises RunFailed: decode was told of ranks that are not those which hold this KV."""
        try:
            params = parse_params(part.transfer)
        except InvalidTransferParams as exc:
            raise RunFailed(f"vLLM's kv_transfer_params cannot be used: {exc}") from exc
        # Without any, vLLM needed the blocks for others; decode computes the prompt.
        if isinstance(params, ReceiveParams) and params.source != self._endpoints:
            self._num_failed_in_a_row = MAX_FAILED_IN_A_ROW
            raise RunFailed("the server was restarted, or is another one now")
