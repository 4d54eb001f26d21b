"""How a messenger works; what its user may choose."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from kv_transfer.checksums import NONE, load_digest
from kv_transfer.errors import InvalidOptions

HOST_PATTERN = re.compile(r"[A-Za-z0-9._:%-]{1,253}")
RDMA_MODES = ("read", "write")
CUDA_PATHS = ("auto", "kernel", "copies", "batch")
PROTOCOL_PATTERN = re.compile(r"[a-z0-9_]{1,32}")


@dataclass(frozen=True, slots=True)
class RdmaOptions:
    """Settings of the RDMA transport. Checked on construction (InvalidOptions names the option).

    Attributes:
        nics: RDMA devices; a rank takes the one at its number modulo theirs. Empty: the fastest that are active.
        ports: where peers connect queue pairs, one a rank, 0 for a free one. Empty: free ones.
        gid_index: of the port's addresses; None takes a RoCE v2 one, IPv4 if there is.
        netdev: network interface whose addresses are preferred.
        timeout_exponent: the device waits 4.096 µs times two to the power of this for an answer, eight times.
        relaxed_ordering: let the NIC write to memory out of order; faster on some hosts.
        queue_pairs: to one peer.
        queue_depth: reads or writes posted on one queue pair, at most.
        max_pieces: local stretches that one read is scattered over, or one write gathered from, at most.
        max_read_bytes: of one read or write.
        mode: ``read``: this rank reads blocks out of a source's pool; ``write``: it has the source write them into its
            own. What a rank sends goes as its destination has it.
    """

    nics: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    gid_index: int | None = None
    netdev: str | None = None
    timeout_exponent: int = 18
    relaxed_ordering: bool = False
    queue_pairs: int = 2
    queue_depth: int = 256
    max_pieces: int = 16
    max_read_bytes: int = 1 << 20
    mode: str = "read"

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, int | None, int, int], ...] = (
            *(("ports", port, 0, 65535) for port in self.ports),
            ("gid_index", self.gid_index, 0, 1023),
            # 0 would wait without end.
            ("timeout_exponent", self.timeout_exponent, 1, 31),
            ("queue_pairs", self.queue_pairs, 1, 64),
            ("queue_depth", self.queue_depth, 1, 32768),
            ("max_pieces", self.max_pieces, 1, 256),
            ("max_read_bytes", self.max_read_bytes, 4096, 1 << 30),
        )
        for option, value, low, high in limits:
            if value is not None and not low <= value <= high:
                raise InvalidOptions(f"rdma.{option}", f"is {value!r}: it must be from {low} to {high}")
        if self.mode not in RDMA_MODES:
            raise InvalidOptions("rdma.mode", f"is {self.mode!r}: known are {', '.join(RDMA_MODES)}")


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """Settings of the transport ``cuda_ipc``. Checked on construction (InvalidOptions names the option).

    Attributes:
        chunk_bytes: moved at a time, where the messenger's ``chunk_bytes`` would take less time than asking for it.
        thread_blocks: of the copy kernel, at most; fewer leave more of the GPU to what computes beside it. 0 for 4 on
            each multiprocessor.
        path: ``auto`` measures at start which way of copying is the fastest; ``kernel``, ``copies`` or ``batch``.
    """

    chunk_bytes: int = 256 << 20
    thread_blocks: int = 0
    path: str = "auto"

    def __post_init__(self) -> None:
        for option, low, high in (("chunk_bytes", 4096, 1 << 34), ("thread_blocks", 0, 1 << 20)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise InvalidOptions(f"cuda.{option}", f"is {value!r}: it must be from {low} to {high}")
        if self.path not in CUDA_PATHS:
            raise InvalidOptions("cuda.path", f"is {self.path!r}: known are {', '.join(CUDA_PATHS)}")


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Settings of one rank's messenger. Checked on construction (InvalidOptions names the option).

    Attributes:
        protocols: transports in order of preference; ``ipc`` stands for ``shm`` where the pool is in host memory, for
            ``cuda_ipc`` where it is in a GPU's.
            A pair uses the first of the destination's that both have and that reaches from one to the other.
        bind_host: interface to listen on.
        advertise_host: where peers connect to; ``bind_host`` when None.
        control_port, data_port: 0 takes free ones.
        secret: shared by all instances of a topic. Who does not prove to know it can neither read a pool nor feed
            one. It authenticates, it does not encrypt.
        heartbeat_s: between signs of life while a transfer is under way.
        silence_s: a peer that is not heard for so long is taken for gone.
        drain_s: how long an aborted source waits for a live peer to stop reading.
        max_inflight: transfers open at one time on this rank, each way.
        chunk_bytes: moved at a time, so that transfers take turns and an abort takes effect soon.
        window_chunks: chunks under way at a time from one peer.
        tcp_streams: data connections to one peer.
        checksum: what a destination has every block checked by, layer by layer: ``none``, ``crc32``, or ``xxh3``,
            which needs the extra ``checksum``. Sources hash what a destination asks for.
        rdma: of the transport of that name.
        optional: those of ``protocols`` that this host may turn out not to have; then the others do, loudly.
        cuda: of the transport ``cuda_ipc``.
    """

    protocols: tuple[str, ...] = ("ipc", "tcp")
    bind_host: str = "127.0.0.1"
    advertise_host: str | None = None
    control_port: int = 0
    data_port: int = 0
    secret: str | None = field(default=None, repr=False)
    heartbeat_s: float = 1.0
    silence_s: float = 3.0
    drain_s: float = 1.0
    max_inflight: int = 4096
    chunk_bytes: int = 8 << 20
    window_chunks: int = 4
    tcp_streams: int = 1
    checksum: str = NONE
    rdma: RdmaOptions = field(default_factory=RdmaOptions)
    optional: tuple[str, ...] = ()
    cuda: CudaOptions = field(default_factory=CudaOptions)

    def __post_init__(self) -> None:
        if not self.protocols:
            raise InvalidOptions("protocols", "is empty: name at least one, such as 'ipc,tcp'")
        for name in self.protocols:
            if not PROTOCOL_PATTERN.fullmatch(name):
                raise InvalidOptions("protocols", f"has {name[:80]!r}: names look like ipc, shm, tcp, rdma")
        for option in ("bind_host", "advertise_host"):
            host = getattr(self, option)
            if host is not None and not HOST_PATTERN.fullmatch(host):
                raise InvalidOptions(option, f"is {host[:80]!r}: give a host name or an IP address")
        if self.advertise_host is None and self.bind_host in ("0.0.0.0", "::"):
            raise InvalidOptions(
                "advertise_host", f"is needed with bind_host {self.bind_host}: where do peers connect?"
            )
        if self.secret == "":
            raise InvalidOptions("secret", "is empty: give one, or leave it out")
        limits: tuple[tuple[str, float, float], ...] = (
            ("control_port", 0, 65535),
            ("data_port", 0, 65535),
            ("heartbeat_s", 0.01, 60),
            ("silence_s", 0.03, 600),
            ("drain_s", 0, 60),
            ("max_inflight", 1, 1_000_000),
            ("chunk_bytes", 4096, 1 << 30),
            ("window_chunks", 1, 1024),
            ("tcp_streams", 1, 64),
        )
        for option, low, high in limits:
            value = getattr(self, option)
            if not low <= value <= high:
                raise InvalidOptions(option, f"is {value!r}: it must be from {low:g} to {high:g}")
        if self.checksum != NONE:
            load_digest(self.checksum)
        if self.silence_s < 2 * self.heartbeat_s:
            raise InvalidOptions(
                "silence_s", f"is {self.silence_s:g}: give at least twice heartbeat_s ({self.heartbeat_s:g})"
            )

    @property
    def public_host(self) -> str:
        return self.advertise_host or self.bind_host


# Reach one host only, and are better there than what reaches all.
_LOCAL_PROTOCOLS = ("ipc", "shm", "cuda_ipc")


def preferred_lanes(protocols: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a user means who names rdma beside others: ipc on one host, else rdma, else tcp; and which of it may fail.

    ``rdma`` alone, and lists without it, mean what they say. → (protocols, optional)
    """
    if "rdma" not in protocols or len(protocols) == 1:
        return protocols, ()
    local = tuple(name for name in protocols if name in _LOCAL_PROTOCOLS)
    others = tuple(name for name in protocols if name not in (*_LOCAL_PROTOCOLS, "tcp"))
    return (*local, *others, "tcp"), ("rdma",)


def parse_protocols(text: str) -> tuple[str, ...]:
    """What ``--cache-transfer-protocol`` means: ``"ipc, tcp"`` → ``("ipc", "tcp")``; a repeated name counts once."""
    return tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
