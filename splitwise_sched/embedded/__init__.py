"""A private Redis or Valkey server, for whoever has none: found, started, shared on one machine, and ended."""

from splitwise_sched.embedded.binary import ServerBinary, find_servers, locate_server
from splitwise_sched.embedded.rendezvous import SharedServer, connect_or_start, default_runtime_dir, share
from splitwise_sched.embedded.scheduler import scheduler_server
from splitwise_sched.embedded.server import EmbeddedServer

__all__ = [
    "EmbeddedServer",
    "ServerBinary",
    "SharedServer",
    "connect_or_start",
    "default_runtime_dir",
    "find_servers",
    "locate_server",
    "scheduler_server",
    "share",
]
