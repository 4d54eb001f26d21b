"""What a peer must know to reach one rank's messenger. Travels as text in the instance's lease record."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from kv_transfer.errors import InvalidEndpoint, InvalidLayout
from kv_transfer.identity import ProcessIdentity
from kv_transfer.layout import KVLayout
from kv_transfer.options import HOST_PATTERN, PROTOCOL_PATTERN

NONCE_PATTERN = re.compile(r"[0-9a-f]{32}")
MAX_TRANSPORTS = 16
MAX_OFFER_FIELDS = 32
MAX_TEXT_CHARS = 512
MAX_ENDPOINTS_CHARS = 1 << 20

Offer = Mapping[str, "str | int"]


@dataclass(frozen=True, slots=True)
class RankEndpoint:
    """Where one rank's messenger is, and what it offers.

    Attributes:
        name: for people, in logs and errors.
        nonce: of this messenger's life; whoever answers at the address under another nonce is somebody else.
        transports: what each transport of the source side needs to be reached, in the source's order.
        wire_version: of the messages between messengers.
    """

    name: str
    host: str
    control_port: int
    nonce: str
    process: ProcessIdentity
    layout: KVLayout
    wire_version: int
    transports: Mapping[str, Offer] = field(default_factory=dict)

    @property
    def tp_rank(self) -> int:
        return self.layout.tp_rank

    @property
    def tp_size(self) -> int:
        return self.layout.tp_size

    def describe(self) -> str:
        """For an error or a log line."""
        return f"{self.name} rank {self.layout.rank} at {self.host}:{self.control_port}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types; ``from_dict`` reads them back."""
        return {
            "wire_version": self.wire_version,
            "name": self.name,
            "host": self.host,
            "control_port": self.control_port,
            "nonce": self.nonce,
            "host_id": self.process.host,
            "pid": self.process.pid,
            "pid_start": self.process.start,
            "layout": self.layout.to_dict(),
            "transports": {name: dict(offer) for name, offer in self.transports.items()},
        }

    @classmethod
    def from_dict(cls, data: object) -> RankEndpoint:
        """Read what ``to_dict`` wrote, from a source that is not trusted.

        Raises:
            InvalidEndpoint: names the field that is missing, unknown, of the wrong type or out of bounds.
        """
        if not isinstance(data, Mapping):
            raise InvalidEndpoint(f"an endpoint record must be a mapping, and is a {type(data).__name__}")
        known = {
            "wire_version",
            "name",
            "host",
            "control_port",
            "nonce",
            "host_id",
            "pid",
            "pid_start",
            "layout",
            "transports",
        }
        for key in data:
            if key not in known:
                raise InvalidEndpoint(f"endpoint record: {str(key)[:80]!r} is not a field of this version")
        try:
            layout = KVLayout.from_dict(data.get("layout"))
        except InvalidLayout as exc:
            raise InvalidEndpoint(f"endpoint record: {exc}") from exc
        return cls(
            name=_check_text("name", data.get("name"), MAX_TEXT_CHARS),
            host=_check_pattern("host", data.get("host"), HOST_PATTERN),
            control_port=_check_number("control_port", data.get("control_port"), 1, 65535),
            nonce=_check_pattern("nonce", data.get("nonce"), NONCE_PATTERN),
            process=ProcessIdentity(
                host=_check_text("host_id", data.get("host_id"), MAX_TEXT_CHARS),
                pid=_check_number("pid", data.get("pid"), 1, 2**31 - 1),
                start=_check_number("pid_start", data.get("pid_start"), 0, 2**63 - 1),
            ),
            layout=layout,
            wire_version=_check_number("wire_version", data.get("wire_version"), 1, 2**31 - 1),
            transports=_check_transports(data.get("transports")),
        )


def endpoints_to_text(endpoints: Sequence[RankEndpoint]) -> str:
    """All ranks of an instance, in rank order, as one field of its lease record."""
    return json.dumps([endpoint.to_dict() for endpoint in endpoints])


def endpoints_from_text(text: str) -> list[RankEndpoint]:
    """Read what ``endpoints_to_text`` wrote, from a source that is not trusted; at least one.

    Raises:
        InvalidEndpoint: says what is wrong with it.
    """
    return list(_parse(text))


@lru_cache(maxsize=64)
def _parse(text: str) -> tuple[RankEndpoint, ...]:
    """Decode is told the same text with each request of an instance."""
    if len(text) > MAX_ENDPOINTS_CHARS:
        raise InvalidEndpoint(f"endpoint records of {len(text)} characters: the limit is {MAX_ENDPOINTS_CHARS}")
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidEndpoint(f"endpoint records are not readable: {exc}") from exc
    if not isinstance(records, list) or not records:
        raise InvalidEndpoint("there are no endpoint records: the peer cannot send KV blocks")
    return tuple(RankEndpoint.from_dict(record) for record in records)


def _check_text(name: str, value: object, limit: int) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= limit or not value.isprintable():
        raise InvalidEndpoint(f"endpoint record: {name} is {str(value)[:80]!r}, not 1 to {limit} printable characters")
    return value


def _check_number(name: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise InvalidEndpoint(f"endpoint record: {name} is {str(value)[:80]!r}, not a whole number {low} to {high}")
    return value


def _check_pattern(name: str, value: object, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise InvalidEndpoint(f"endpoint record: {name} is {str(value)[:80]!r}, which does not look like one")
    return value


def _check_transports(value: object) -> dict[str, Offer]:
    if not isinstance(value, Mapping) or len(value) > MAX_TRANSPORTS:
        raise InvalidEndpoint(f"endpoint record: transports must be a mapping of at most {MAX_TRANSPORTS} names")
    found: dict[str, Offer] = {}
    for key, offer in value.items():
        name = _check_pattern("transport name", key, PROTOCOL_PATTERN)
        if not isinstance(offer, Mapping) or len(offer) > MAX_OFFER_FIELDS:
            raise InvalidEndpoint(
                f"endpoint record: transport {name} has no offer of at most {MAX_OFFER_FIELDS} fields"
            )
        found[name] = {
            _check_text(f"{name} field", field_name, 64): (
                _check_number(f"{name} {field_name}", item, -(2**63), 2**63 - 1)
                if isinstance(item, int)
                else _check_text(f"{name} {field_name}", item, MAX_TEXT_CHARS)
            )
            for field_name, item in offer.items()
        }
    return found
