"""Transports by name: what is installed, and what a name of the options stands for."""

from __future__ import annotations

from importlib import metadata
from typing import cast

from kv_transfer.errors import UnknownTransport
from kv_transfer.options import TransferOptions
from kv_transfer.transports.base import Transport

GROUP = "kv_transfer.transports"
# What a user's word stands for, where it is not a transport itself: for a pool in host memory, and on a GPU.
ALIASES = {"ipc": ("shm", "cuda_ipc")}


def installed_transports() -> list[str]:
    """Names of all that are registered; none is imported."""
    return sorted({entry.name for entry in metadata.entry_points(group=GROUP)})


def load_transport(name: str, *, is_on_device: bool = False) -> type[Transport]:
    """The class behind a name of ``TransferOptions.protocols``.

    Args:
        is_on_device: whether the pool is in the memory of a GPU.
    Raises:
        UnknownTransport: nothing is registered under it, or what is cannot be imported here.
    """
    target = ALIASES[name][is_on_device] if name in ALIASES else name
    for entry in metadata.entry_points(group=GROUP):
        if entry.name != target:
            continue
        try:
            found = entry.load()
        except ImportError as exc:
            raise UnknownTransport(
                name, installed_transports(), f"It is registered but cannot be imported: {exc}"
            ) from exc
        return cast("type[Transport]", found)
    raise UnknownTransport(name, installed_transports())


def preflight(options: TransferOptions, *, is_on_device: bool = False) -> None:
    """Find out what is missing before anything is done that takes long.

    Args:
        is_on_device: whether the pool will be in the memory of a GPU.
    Raises:
        UnknownTransport: a protocol is not to be had.
        TransportFailed: this host lacks what one needs that is not optional.
    """
    for cls in load_transports(options.protocols, is_on_device=is_on_device):
        if cls.name not in options.optional:
            cls.preflight(options)


def load_transports(protocols: tuple[str, ...], *, is_on_device: bool = False) -> list[type[Transport]]:
    """The classes behind several names, in their order, each once.

    Raises:
        UnknownTransport: one of them is not to be had.
    """
    return list(dict.fromkeys(load_transport(name, is_on_device=is_on_device) for name in protocols))
