"""Addresses of this host's network interfaces."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from kv_transfer.errors import InvalidOptions

_SIOCGIFADDR = 0x8915
_MAX_NAME_BYTES = 15


def interface_address(name: str) -> str:
    """An interface's IPv4 address.

    Raises:
        InvalidOptions: there is no such interface, or it has none; names those that are.
    """
    encoded = name.encode()
    known = ", ".join(interface for _, interface in socket.if_nameindex())
    if not 1 <= len(encoded) <= _MAX_NAME_BYTES or name not in known.split(", "):
        raise InvalidOptions("socket_ifname", f"is {name[:80]!r}: there is no such interface; those that are: {known}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", encoded))
        except OSError as exc:
            raise InvalidOptions("socket_ifname", f"is {name!r}: {os.strerror(exc.errno or 0)}") from exc
    return socket.inet_ntoa(answer[20:24])
