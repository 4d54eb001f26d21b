"""Redis-backed global scheduler for prefill/decode disaggregated LLM inference.

``FrontEnd`` submits requests and streams their outputs (asyncio); ``Instance`` is what a serving loop embeds,
``InstanceSession`` the same for asyncio.
"""

from splitwise_sched.errors import (
    ConfigError,
    DeadlineUnreachable,
    DuplicateRequest,
    Fenced,
    IncompatibleInstance,
    InvalidRequest,
    NoShardLeft,
    QueueFull,
    RequestFailed,
    SplitwiseError,
    StoreUnavailable,
    StoreUnsuitable,
    UnknownModel,
)
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.instance import InstanceSession
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.records import (
    DecodeAssigned,
    Dropped,
    InstanceEvent,
    InstanceRecord,
    LeaseLost,
    PrefillAssigned,
    Registration,
)
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.sync import Instance
from splitwise_sched.types import FinishReason, Output, Request, RequestState, Role, SamplingParams, TokenLogprob

__all__ = [
    "ConfigError",
    "DeadlineUnreachable",
    "DecodeAssigned",
    "Dropped",
    "DuplicateRequest",
    "Fenced",
    "FinishReason",
    "FrontEnd",
    "IncompatibleInstance",
    "Instance",
    "InstanceEvent",
    "InstanceRecord",
    "InstanceSession",
    "InvalidRequest",
    "LeaseLost",
    "NoShardLeft",
    "Output",
    "OutputStream",
    "PrefillAssigned",
    "QueueFull",
    "Registration",
    "Request",
    "RequestFailed",
    "RequestState",
    "Role",
    "SamplingParams",
    "SchedulerSettings",
    "SplitwiseError",
    "StoreUnavailable",
    "StoreUnsuitable",
    "TokenLogprob",
    "UnknownModel",
]
