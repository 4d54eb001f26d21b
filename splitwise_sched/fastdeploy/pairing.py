"""What a request says about the peer that it shares KV with. Pure."""

from __future__ import annotations

import json
from typing import Any

MAX_DISAGGREGATED_CHARS = 1 << 16


def disaggregate_info(peer_text: str, peer_host: str, host: str) -> dict[str, Any] | None:
    """The peer's own announcement, with the one transfer protocol to use: ``ipc`` on one host, else ``rdma``.

    A peer that offers other protocols, or one only, is reached by the first that it names.

    Args:
        peer_text: what the peer gave to ``start`` as ``disaggregated``, as JSON; untrusted.

    Returns:
        None when the peer announced nothing usable.
    """
    if len(peer_text) > MAX_DISAGGREGATED_CHARS:
        return None
    try:
        info = json.loads(peer_text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(info, dict):
        return None
    offered = info.get("transfer_protocol")
    if isinstance(offered, str):
        offered = [name.strip() for name in offered.split(",")]
    if isinstance(offered, list) and offered:
        both = "ipc" in offered and "rdma" in offered
        info["transfer_protocol"] = ("ipc" if peer_host == host else "rdma") if both else offered[0]
    return info
