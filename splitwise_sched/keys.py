"""Names of everything that Redis holds for one topic.

All keys of a shard share the hash tag ``{topic:shard}``, so that they lie in one Cluster slot and one script may use
any of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PREFILL_GROUP = "prefill"


@dataclass(frozen=True, slots=True)
class Keys:
    topic: str
    shard: int = 0
    prefix: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", f"pd:{{{self.topic}:{self.shard}}}:")

    def request(self, request_id: str) -> str:
        """HASH: the request's record: state, epoch, who holds it, when what happened."""
        return f"{self.prefix}request:{request_id}"

    def body(self, request_id: str) -> str:
        """STRING: prompt and sampling parameters (codec.py). The only binary value."""
        return f"{self.prefix}body:{request_id}"

    def incoming(self, nonce: str) -> str:
        """STRING: a body on its way in; ``submit`` or ``resubmit`` makes it the request's, or drops it."""
        return f"{self.prefix}incoming:{nonce}"

    @property
    def queue(self) -> str:
        """STREAM with group ``prefill``: requests that wait for, or are in, prefill."""
        return f"{self.prefix}queue"

    def preferred(self, instance_id: str) -> str:
        """STREAM with group ``prefill``: requests that wait for this prefill instance in particular, for a bound."""
        return f"{self.prefix}preferred:{instance_id}"

    def inbox(self, instance_id: str) -> str:
        """STREAM: requests that this decode instance holds; it reads it alone, and entries go when requests end."""
        return f"{self.prefix}inbox:{instance_id}"

    def control(self, instance_id: str) -> str:
        """STREAM: what this instance is told to drop."""
        return f"{self.prefix}control:{instance_id}"

    def instance(self, instance_id: str) -> str:
        """HASH that expires: an instance's lease; its role, addresses, capacity and load."""
        return f"{self.prefix}instance:{instance_id}"

    @property
    def instances(self) -> str:
        """SET: ids of all instances that were not yet reaped."""
        return f"{self.prefix}instances"

    @property
    def decode_load(self) -> str:
        """ZSET: live decode instances by the part of their KV capacity that is reserved."""
        return f"{self.prefix}decode-load"

    def out(self, frontend_id: str) -> str:
        """STREAM that expires: outputs for this front end, one field a request (outputs.py)."""
        return f"{self.prefix}out:{frontend_id}"

    def frontend(self, frontend_id: str) -> str:
        """STRING that expires: a front end's lease."""
        return f"{self.prefix}frontend:{frontend_id}"

    @property
    def frontends(self) -> str:
        """ZSET: ids of all front ends that were not yet swept, by the Redis time (ms) at which their lease lapses."""
        return f"{self.prefix}frontends"

    @property
    def deadlines(self) -> str:
        """ZSET: request ids by the Redis time (ms) at which they expire."""
        return f"{self.prefix}deadlines"

    @property
    def dead_letter(self) -> str:
        """STREAM: requests that were given up, with the reason."""
        return f"{self.prefix}dead-letter"

    @property
    def waiting(self) -> str:
        """ZSET: classes that have requests in the waiting room (lua/waiting_room.lua names the keys below it)."""
        return f"{self.prefix}waiting"

    @property
    def placement(self) -> str:
        """STRING that expires: held by the instance that is choosing its shard; on shard 0."""
        return f"{self.prefix}placement"

    @property
    def counters(self) -> str:
        """HASH: how many requests were submitted, bound, finished, lost ..."""
        return f"{self.prefix}counters"
