"""Scattered memory that is sent or received over several system calls.

The C library is called with arrays of addresses as numpy makes them: for blocks of a few KiB, a Python object for each
would cost more than their copying.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket

import numpy as np

from kv_transfer.views import ByteArray, Iovecs

# Buffers in one system call: the kernel's limit.
MAX_IOVECS = 1024


class _MsgHdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_sendmsg, _recvmsg = _libc.sendmsg, _libc.recvmsg
for _function in (_sendmsg, _recvmsg):
    _function.argtypes = [ctypes.c_int, ctypes.POINTER(_MsgHdr), ctypes.c_int]
    _function.restype = ctypes.c_ssize_t


def whole(array: ByteArray) -> Iovecs:
    """One stretch: all of a contiguous array."""
    return np.array([[array.ctypes.data, array.nbytes]], np.uint64)


class Buffers:
    """What is left of a list of stretches of memory."""

    def __init__(self, iovecs: Iovecs, owner: object) -> None:
        """
        Args:
            iovecs: none of them empty.
            owner: what keeps the memory; held as long as this object.
        """
        self._owner = owner
        self._iovecs = np.ascontiguousarray(iovecs)
        self._addresses, self._lengths = self._iovecs[:, 0].copy(), self._iovecs[:, 1].copy()
        self._ends = np.cumsum(self._lengths, dtype=np.int64)
        self._done = self._next = 0
        self._address = self._iovecs.ctypes.data
        self._header = _MsgHdr()

    @property
    def num_stretches(self) -> int:
        return len(self._lengths)

    def send(self, sock: socket.socket) -> int:
        """Send some; the number of bytes. Raises BlockingIOError when the socket is full."""
        return self._move(_sendmsg, sock, socket.MSG_NOSIGNAL)

    def receive(self, sock: socket.socket) -> int:
        """Fill some; the number of bytes, 0 at the stream's end. Raises BlockingIOError when there are none."""
        return self._move(_recvmsg, sock, 0)

    def _move(self, function: ctypes._NamedFuncPointer, sock: socket.socket, flags: int) -> int:
        header = self._header
        header.iov = self._address + 16 * self._next
        header.iovlen = min(MAX_IOVECS, len(self._ends) - self._next)
        moved = int(function(sock.fileno(), ctypes.byref(header), flags | socket.MSG_DONTWAIT))
        if moved < 0:
            error = ctypes.get_errno()
            if error in (errno.EAGAIN, errno.EINTR):
                raise BlockingIOError(error, os.strerror(error))
            raise OSError(error, os.strerror(error))
        self._advance(moved)
        return moved

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        at = self._next = int(np.searchsorted(self._ends, self._done, "right"))
        if at < len(self._ends):
            left = int(self._ends[at]) - self._done
            self._iovecs[at, 0] = int(self._addresses[at]) + int(self._lengths[at]) - left
            self._iovecs[at, 1] = left
