"""A ``vllm serve`` beside this process, over HTTP: is it well, what does it serve, how busy is it, and its completions.

It is asked as any client would, and nothing that it says is trusted: sizes are bounded, what is not as expected fails
the run that asked.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from engine.vllm.completions import END, Events, message_of, payload_of
from engine.vllm.facts import ServedModel, figures_of, served_models_of, version_of
from engine.vllm.parts import RunFailed, RunRefused
from splitwise_sched.errors import ConfigError, SplitwiseError

CONNECT_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 4 << 20
MAX_METRICS_BYTES = 16 << 20
MAX_ERROR_BYTES = 1 << 16
# Of the request, which another server would refuse as well.
REFUSALS = (400, 413, 422)
# Too much to do; that tells nothing bad of the server.
BUSY = (429, 503)


class ServerGone(SplitwiseError):
    """Nobody answers there, or says that the engine is dead."""


class ServerSilent(SplitwiseError):
    """The server takes the connection, and does not answer in time."""


class ServerBusy(RunFailed):
    """The server has too much to do for this run."""


class VllmServer:
    """
    Args:
        url: checked by AttachSettings.
        api_key: of its ``--api-key``.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        headers = {"Accept-Encoding": "identity", "User-Agent": "splitwise-sched"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(ASK_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            # It is beside us: no proxy of the environment is meant for it.
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def check_health(self, timeout_s: float) -> None:
        """Raises ServerGone or ServerSilent."""
        status, body = await self._get("/health", MAX_ERROR_BYTES, timeout_s)
        if status != 200:
            raise ServerGone(f"{self.url}/health answers {status}: {message_of(body)}")

    async def version(self) -> str:
        """
        Raises:
            ServerGone, ServerSilent
            ConfigError: this is no vLLM.
        """
        status, body = await self._get("/version", MAX_ERROR_BYTES)
        version = version_of(body)
        if status != 200 or version is None:
            raise ConfigError(
                f"--vllm-url {self.url} is no vLLM: its /version answers {status}, {body[:80]!r}; give the address of "
                "a `vllm serve`"
            )
        return version

    async def served_model(self, name: str | None) -> ServedModel:
        """
        Args:
            name: None: the first.
        Raises:
            ServerGone, ServerSilent
            ConfigError: it does not serve that model, or wants another key.
        """
        status, body = await self._get("/v1/models", MAX_ANSWER_BYTES)
        if status in (401, 403):
            raise ConfigError(f"{self.url} refuses the API key ({status}): set SPLITWISE_VLLM_API_KEY to its --api-key")
        models = served_models_of(body)
        if not models:
            raise ConfigError(
                f"{self.url}/v1/models answers {status}, {body[:80]!r}, and no model with a length: is it a `vllm "
                "serve`?"
            )
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise ConfigError(
                f"--served-model-name is {name!r}, but {self.url} serves {', '.join(models)[:300]}: give one of these"
            )
        return models[name]

    async def figures(self, timeout_s: float) -> tuple[dict[str, int | float | str], int]:
        """What it counts of itself, summed over its engines, and how many these are; empty when it counts nothing.

        Raises:
            ServerGone, ServerSilent
        """
        status, body = await self._get("/metrics", MAX_METRICS_BYTES, timeout_s)
        return figures_of(body if status == 200 else b"")

    async def complete(self, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Raises RunRefused or RunFailed."""
        async with self._post(body, timeout_s) as response:
            return payload_of(await _read(response, MAX_ANSWER_BYTES))

    async def stream(self, body: Mapping[str, Any], timeout_s: float) -> AsyncGenerator[dict[str, Any], None]:
        """Events up to the last; leaving early ends the run in vLLM. Raises RunRefused or RunFailed.

        Args:
            timeout_s: between two of them.
        """
        events = Events()
        async with self._post(body, timeout_s) as response:
            async for data in response.aiter_raw():
                for event in events.feed(data):
                    if event != END:
                        yield payload_of(event)

    @asynccontextmanager
    async def _post(self, body: Mapping[str, Any], timeout_s: float) -> AsyncGenerator[httpx.Response, None]:
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)
        try:
            async with self._client.stream(
                "POST", f"{self.url}/v1/completions", json=body, timeout=timeout
            ) as response:
                if response.status_code != 200:
                    await _raise_for(response)
                yield response
        except httpx.HTTPError as exc:
            raise RunFailed(f"vLLM at {self.url} broke off: {exc or type(exc).__name__}") from exc

    async def _get(self, path: str, limit: int, timeout_s: float = ASK_TIMEOUT_S) -> tuple[int, bytes]:
        """Status and body, which may have ``limit`` bytes. Raises ServerGone or ServerSilent."""

        async def ask() -> tuple[int, bytes]:
            async with self._client.stream("GET", self.url + path) as response:
                return response.status_code, await _read(response, limit)

        try:
            status, body = await asyncio.wait_for(ask(), timeout_s)
        except (asyncio.TimeoutError, httpx.ReadTimeout) as exc:
            raise ServerSilent(f"{self.url}{path} does not answer within {timeout_s:g} s") from exc
        except httpx.HTTPError as exc:
            raise ServerGone(f"{self.url} does not answer: {exc or type(exc).__name__}") from exc
        except RunFailed as exc:
            raise ServerGone(str(exc)) from exc
        if status >= 500:
            raise ServerGone(f"{self.url}{path} answers {status}: {message_of(body)}")
        return status, body


async def _raise_for(response: httpx.Response) -> None:
    body = b""
    async for data in response.aiter_raw():
        body += data
        if len(body) > MAX_ERROR_BYTES:
            break
    status = response.status_code
    kind = RunRefused if status in REFUSALS else ServerBusy if status in BUSY else RunFailed
    raise kind(f"vLLM answers {status}: {message_of(body)}")


async def _read(response: httpx.Response, limit: int) -> bytes:
    body = bytearray()
    async for data in response.aiter_raw():
        body += data
        if len(body) > limit:
            raise RunFailed(f"vLLM's answer to {response.request.url.path} has more than {limit} bytes")
    return bytes(body)
