"""Moves KV-cache blocks between the pools of two engine ranks. Knows nothing of Redis or of any engine."""

from kv_transfer.endpoint import RankEndpoint, endpoints_from_text, endpoints_to_text
from kv_transfer.errors import (
    InvalidEndpoint,
    InvalidLayout,
    InvalidOptions,
    InvalidTransfer,
    KVTransferError,
    LayoutMismatch,
    MessengerClosed,
    PoolNotServed,
    PoolUnavailable,
    RdmaUnavailable,
    TransportFailed,
    UnknownTransport,
)
from kv_transfer.events import Received, Sent, TransferEvent, TransferFailed, TransferStats
from kv_transfer.host_pool import TensorPool
from kv_transfer.lanes import LaneReport
from kv_transfer.layout import KVLayout, check_compatible
from kv_transfer.memory import KVPool
from kv_transfer.messenger import Messenger
from kv_transfer.options import CudaOptions, RdmaOptions, TransferOptions, parse_protocols
from kv_transfer.placement import Base, Placement
from kv_transfer.pool import BlockPool
from kv_transfer.tickets import NOT_WANTED

__all__ = [
    "NOT_WANTED",
    "Base",
    "BlockPool",
    "CudaOptions",
    "InvalidEndpoint",
    "InvalidLayout",
    "InvalidOptions",
    "InvalidTransfer",
    "KVLayout",
    "KVPool",
    "KVTransferError",
    "LaneReport",
    "LayoutMismatch",
    "Messenger",
    "MessengerClosed",
    "Placement",
    "PoolNotServed",
    "PoolUnavailable",
    "RankEndpoint",
    "RdmaOptions",
    "RdmaUnavailable",
    "Received",
    "Sent",
    "TensorPool",
    "TransferEvent",
    "TransferFailed",
    "TransferOptions",
    "TransferStats",
    "TransportFailed",
    "UnknownTransport",
    "check_compatible",
    "endpoints_from_text",
    "endpoints_to_text",
    "parse_protocols",
]
