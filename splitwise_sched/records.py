"""What an instance tells about itself in Redis, and what others read there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from splitwise_sched.errors import InvalidRequest
from splitwise_sched.types import Request, Role, check_id


@dataclass(frozen=True, slots=True)
class Registration:
    """An instance's announcement; becomes the fields of its lease record.

    Attributes:
        name: stable over restarts; the instance id is this and a boot nonce.
        must_match: fields that have to be equal on all live instances of a topic (model, KV layout).
        capacity_tokens: tokens that the KV pool holds.
        capacity_requests: decode requests that may be reserved at a time.
        details: further readable fields: addresses, engine, version, tokenizer, ``kv_endpoints`` (JSON) ...
    """

    name: str
    role: Role
    model: str
    must_match: Mapping[str, str]
    capacity_tokens: int
    capacity_requests: int
    block_size: int
    max_model_len: int
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> dict[str, str]:
        """Fields of the lease record that are equal on all instances of a shard."""
        return {"model": self.model, **self.must_match}


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """A live instance, as its lease record tells."""

    instance_id: str
    role: Role
    model: str
    max_model_len: int
    capacity_tokens: int
    reserved_tokens: int
    fields: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.fields.get("name", self.instance_id)

    @property
    def tokenizer(self) -> str:
        """Directory of the tokenizer on the instance's machine, or ""."""
        return self.fields.get("tokenizer", "")

    @classmethod
    def from_fields(cls, instance_id: str, fields: Mapping[str, str]) -> InstanceRecord | None:
        """None when the record is not one that an instance of this version writes."""
        try:
            check_id("instance", fields.get("name", instance_id))
            return cls(
                instance_id=instance_id,
                role=Role(fields["role"]),
                model=fields["model"],
                max_model_len=int(fields["max_model_len"]),
                capacity_tokens=int(fields["capacity_tokens"]),
                reserved_tokens=int(fields["reserved_tokens"]),
                fields=fields,
            )
        except (KeyError, ValueError, InvalidRequest):
            return None


Run = tuple[str, int]  # request id, epoch


@dataclass(frozen=True, slots=True)
class Claim:
    """An entry of a queue that this instance took: ``queue``, or ``preferred:<its id>``."""

    queue: str
    entry_id: str
    request_id: str
    epoch: int

    @property
    def run(self) -> Run:
        return self.request_id, self.epoch


@dataclass(frozen=True, slots=True)
class Bound:
    """What ``bind`` said of one claim."""

    request_id: str
    verdict: str
    decode_instance: str
    frontend_id: str


def run_key(request_id: str, epoch: int) -> str:
    """Names one run of one request, on both its instances: what a loop files it under, and the id of its transfer."""
    return f"{request_id}@{epoch}"


@dataclass(frozen=True, slots=True)
class PrefillAssigned:
    """This instance computes the prompt; ``decode_instance`` is its own id when it also goes on with the request.

    Attributes:
        decode_fields: the lease record of another decode instance, {} when that has just lapsed, or is this one's own.
    """

    request: Request
    epoch: int
    decode_instance: str
    decode_fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return run_key(self.request.request_id, self.epoch)


@dataclass(frozen=True, slots=True)
class DecodeAssigned:
    """KV of this request comes from ``prefill_instance``; room for it is reserved in the accounts already."""

    request: Request
    epoch: int
    prefill_instance: str
    prefill_fields: Mapping[str, str]

    @property
    def key(self) -> str:
        return run_key(self.request.request_id, self.epoch)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A run of a request is over for this instance: cancelled, expired, taken back."""

    request_id: str
    epoch: int
    reason: str

    @property
    def key(self) -> str:
        return run_key(self.request_id, self.epoch)


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The instance outlived its lease: everything that it holds belongs to others. Drop all of it.

    Attributes:
        new_instance_id: it is registered again already, under this id; None when that failed for good.
    """

    reason: str
    new_instance_id: str | None


InstanceEvent = PrefillAssigned | DecodeAssigned | Dropped | LeaseLost
