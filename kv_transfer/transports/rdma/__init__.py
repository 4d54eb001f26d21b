"""RDMA between hosts, through pyverbs: the destination reads blocks out of the source's registered pool.

Importing it needs no RDMA library; ``offer`` finds out whether there is one, and a device.
"""

from kv_transfer.transports.rdma.transport import RdmaTransport

__all__ = ["RdmaTransport"]
