"""Everything here needs a CUDA device; without one it is skipped, in CI too, which has none."""

from __future__ import annotations

import pytest

from kv_transfer.errors import TransportFailed
from kv_transfer.transports.cuda_ipc.runtime import open_runtime
from tests.integration.kv_pairs import ranks  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def cuda_device() -> None:
    try:
        open_runtime()
    except TransportFailed as exc:
        pytest.skip(str(exc))
