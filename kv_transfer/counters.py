"""Plain counters of one messenger; whoever embeds it exports them."""

from __future__ import annotations

import threading
from collections import Counter


class Counters:
    """Thread-safe.

    Names: ``sent_total received_total send_failed_total receive_failed_total`` (transfers),
    ``bytes_sent_<lane> bytes_received_<lane>`` (of transfers that ended well), ``downgrades_total`` (a peer is reached
    by a lower lane than the first one that should reach it), ``lanes_missing_total`` (named, and not to be had on this
    host), ``not_served_total`` (transports that cannot serve this kind of pool), ``checksum_mismatch_total`` (chunks
    that did not arrive as they were hashed), ``garbage_total`` (messages that nobody should send), ``refused_total``
    (peers that were turned away), ``peers_lost_total``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter(
            dict.fromkeys(
                (
                    "sent_total",
                    "received_total",
                    "send_failed_total",
                    "receive_failed_total",
                    "downgrades_total",
                    "not_served_total",
                    "checksum_mismatch_total",
                    "lanes_missing_total",
                    "garbage_total",
                    "refused_total",
                    "peers_lost_total",
                ),
                0,
            )
        )

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._values[name] += amount

    def snapshot(self) -> dict[str, int | float]:
        with self._lock:
            return dict(self._values)
