"""What a vLLM instance tells about itself in the topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kv_transfer.endpoint import RankEndpoint, endpoints_to_text
from splitwise_sched.records import Registration
from splitwise_sched.types import Role


def registration_of(
    endpoints: Sequence[RankEndpoint],
    *,
    name: str,
    role: Role,
    model: str,
    max_model_len: int,
    max_num_seqs: int,
    details: Mapping[str, str],
) -> Registration:
    """
    Args:
        endpoints: of its ranks, as its connector wrote them; whether two instances can exchange KV is told by their
            layouts alone, so that one in our process and one beside it may form a pair.
    """
    layout = endpoints[0].layout
    return Registration(
        name=name,
        role=role,
        model=model,
        must_match={f"kv.{field}": value for field, value in layout.compatibility().items()},
        capacity_tokens=layout.num_blocks * layout.block_size,
        capacity_requests=max_num_seqs,
        block_size=layout.block_size,
        max_model_len=max_model_len,
        details={**details, "kv_endpoints": endpoints_to_text(endpoints)},
    )
