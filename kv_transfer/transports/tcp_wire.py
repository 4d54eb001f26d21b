"""What is said on a data connection. The destination connects to the source.

    preface   magic, data token of the session          once, destination -> source
    request   token of the transfer, request number, number of ids, then the ids (unsigned 32-bit little-endian)
    response  request number, status, number of bytes, then the bytes: in the order of the requests

Nobody can write into a pool from outside: a destination has no port, and reads only what it asked for.
"""

from __future__ import annotations

import struct

MAGIC = b"KVDATA\x00\x01"
PREFACE = struct.Struct("<8s16s")
REQUEST = struct.Struct("<16sII")
RESPONSE = struct.Struct("<IIQ")

STATUS_OK = 0
STATUS_REFUSED = 1

MAX_IDS_PER_REQUEST = 65536
MAX_RESPONSE_BYTES = 4 << 30
# Requests of one connection that the source keeps in mind; it stops reading beyond.
MAX_QUEUED_REQUESTS = 64
# Time that a stranger has for its preface, and strangers at one time.
PREFACE_TIMEOUT_S = 5.0
MAX_STRANGERS = 256
