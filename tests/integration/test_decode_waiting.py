"""What a decode instance does for requests that wait for blocks."""

from __future__ import annotations

from typing import Any, cast

from engine.decode_leg import DecodeLeg
from engine.ranks import RankGroup
from kv_transfer import KVPool, TransferOptions
from kv_transfer.endpoint import endpoints_to_text
from splitwise_sched.records import DecodeAssigned
from splitwise_sched.types import Request
from tests.integration.kv_rank import LAYOUT, LocalRank, wait_for

TCP = TransferOptions(protocols=("tcp",))


class FullEngine:
    """Of an engine, what a request meets that it has no blocks for."""

    def check(self, request: Request) -> None:
        pass

    def reserve(self, key: str, request: Request) -> None:
        return None


def test_the_source_of_a_request_that_waits_behind_another_is_connected_to_meanwhile() -> None:
    first, second = (LocalRank(LAYOUT, TCP, name, seed=1) for name in ("prefill-0", "prefill-1"))
    with KVPool.allocate(LAYOUT) as pool:
        ranks = RankGroup([pool], TCP, name="decode", on_event=lambda: None)
        ranks.start()
        try:
            leg = DecodeLeg(cast(Any, FullEngine()), ranks, cast(Any, None), default_timeout_s=60)
            for number, source in enumerate((first, second)):
                fields = {"kv_endpoints": endpoints_to_text([source.endpoint])}
                request = Request(f"r{number}", "tiny", (1, 2, 3))
                leg.assign(f"r{number}@1", DecodeAssigned(request, 1, source.endpoint.name, fields))
                leg.reserve_waiting()
            wait_for(lambda: [lane.state for lane in ranks.lanes()] == ["up"])
            assert [lane.peer.split()[0] for lane in ranks.lanes()] == ["prefill-1"]
        finally:
            ranks.close()
            first.close()
            second.close()
