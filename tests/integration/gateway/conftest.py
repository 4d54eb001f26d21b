"""A scripted instance and its tokenizer, behind every gateway here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import RedisServer
from tests.integration.gateway.parts import ScriptedInstance, gateway
from tests.integration.toy import settings_for
from tests.tokenizer_dirs import CHATML, byte_level, saved


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), byte_level(), chat_template=CHATML, eos_token="<|im_end|>")


@pytest.fixture
async def instance(redis_server: RedisServer, topic: str, tokenizer_dir: Path) -> AsyncIterator[ScriptedInstance]:
    async with ScriptedInstance(settings_for(redis_server, topic), tokenizer_dir) as scripted:
        yield scripted


@pytest.fixture
async def url(redis_server: RedisServer, topic: str, instance: ScriptedInstance) -> AsyncIterator[str]:
    async with gateway(settings_for(redis_server, topic)) as url:
        yield url
