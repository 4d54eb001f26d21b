"""An instance's own HTTP port: how it is, what it holds, and another role."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.demo.fleet import Fleet, free_port
from engine.testing import make_tiny_model
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.types import Role
from tests.e2e.reference import generate
from tests.engine_drivers import greedy, random_prompt


async def test_instance_tells_how_it_is_and_takes_another_role(tmp_path: Path):
    model = make_tiny_model("llama", tmp_path)
    request = greedy(random_prompt(40), 24)
    port, metrics_port = free_port(), free_port()
    flags = ("--served-model-name", "tiny", "--num-gpu-blocks-override", "100")
    http = ("--port", str(port), "--metrics-port", str(metrics_port))
    with Fleet() as fleet:
        fleet.start_instance("mixed", 0, model, (*flags, *http))
        await fleet.wait_for_instances(1)
        async with FrontEnd(fleet.settings) as frontend, httpx.AsyncClient() as client:
            base = f"http://127.0.0.1:{port}"
            tokens = [t async for o in await frontend.submit(request) for t in o.token_ids]
            assert tokens == generate(model, [request])[request.request_id]
            health = (await client.get(f"{base}/health")).json()
            assert (health["healthy"], health["role"], health["model"]) == (True, "mixed", "tiny")
            assert (await client.get(f"{base}/load")).json()["free_blocks"] == 100
            metrics = (await client.get(f"http://127.0.0.1:{metrics_port}/metrics")).text
            assert 'splitwise_instance_num_finished_total{model="tiny",role="mixed",topic="demo"} 1.0' in metrics
            assert (await client.get(f"http://127.0.0.1:{metrics_port}/health")).status_code == 404
            refused = await client.post(f"{base}/role", content="boss")
            assert refused.status_code == 400 and "send one of prefill, decode, mixed" in refused.text
            assert (await client.post(f"{base}/role", content="decode")).status_code == 202

            async def is_decode() -> None:
                while [r.role for r in await frontend.store.live_instances()] != [Role.DECODE]:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

            await asyncio.wait_for(is_decode(), 20)
        fleet.check()
