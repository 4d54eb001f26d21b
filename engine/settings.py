"""Settings of an instance, beside the scheduler's: its engine, its KV transfer, its ports."""

from __future__ import annotations

import socket
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from kv_transfer.errors import KVTransferError
from kv_transfer.interfaces import interface_address
from kv_transfer.options import CudaOptions, RdmaOptions, TransferOptions, parse_protocols, preferred_lanes
from kv_transfer.topology import parse_nics
from splitwise_sched.errors import ConfigError
from splitwise_sched.setting_fields import also_known_as
from splitwise_sched.settings import ExplicitSettings
from splitwise_sched.types import Role, check_id


class InstanceSettings(ExplicitSettings):
    """What the instance is in its topic, and where it can be asked how it is."""

    splitwise_role: Role = Field(Role.MIXED, description="What this instance does: prefill, decode or both (mixed).")
    instance_name: str | None = Field(
        None,
        description="Name that stays over restarts; its id is this and a boot nonce. Left out: role and host name.",
    )
    host: str = Field("127.0.0.1", description="Interface of --port and --metrics-port.")
    port: int | None = Field(None, ge=0, le=65535, description="HTTP port with /health, /load and /metrics; 0: any.")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="HTTP port with /metrics alone; 0: any.")
    max_waiting_tokens: int = Field(
        2048, ge=1, description="Prompt tokens claimed ahead of their computation; the rest waits in the common queue."
    )

    drain_timeout_s: float = Field(
        30.0, ge=0, le=86400, description="How long what it holds may go on after SIGTERM, before it goes back."
    )

    @field_validator("instance_name")
    @classmethod
    def _name_is_an_id(cls, value: str | None) -> str | None:
        return value if value is None else check_id("instance", value)

    @property
    def name(self) -> str:
        if self.instance_name is not None:
            return self.instance_name
        host = "".join(c if c.isalnum() or c in "._-" else "-" for c in socket.gethostname())
        return f"{self.splitwise_role.value}-{host}"[:100]


class EngineSettings(ExplicitSettings):
    """The engine and its model. What an engine has no use for is refused by it, or says so."""

    engine: str = Field(
        "transformers", description="Inference engine that runs the model: transformers, llama_cpp, or a plugin's."
    )
    model: str = Field(min_length=1, description="Model directory or Hugging Face hub id; for llama_cpp a GGUF file.")
    served_model_name: str | None = Field(None, description="Name that requests ask for. Left out: --model as given.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and KV; auto is the model's own."
    )
    device: str = Field("cpu", description="cpu, cuda or cuda:<n>.")
    block_size: int = Field(16, ge=1, le=4096, description="Tokens in a KV block; may differ between instances.")
    num_gpu_blocks_override: int | None = Field(
        None, ge=2, description="KV blocks in the pool. Left out: as many as fit into --kv-memory-mb."
    )
    kv_memory_mb: int | None = Field(None, ge=1, description="MiB of the KV pool. Left out: 1024.")
    max_num_seqs: int = Field(64, ge=1, description="Sequences in one forward pass, at most.")
    max_num_batched_tokens: int = Field(
        1024, ge=1, description="Tokens in one forward pass, at most; longer prompts are prefilled in chunks."
    )
    max_model_len: int | None = Field(
        None, ge=2, description="Prompt and output tokens together. Left out: what model and pool allow."
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of the engine. Left out: torch's choice.")
    tensor_parallel_size: int = Field(
        1, ge=1, le=1024, description="Ranks that share the model; engines that have only one say so."
    )
    engine_args: str | None = Field(
        None, description="JSON object of further arguments, for an engine with flags of its own (vllm)."
    )


class AttachSettings(ExplicitSettings):
    """A ``vllm serve`` that somebody else starts, with this project's connector."""

    vllm_url: str = Field(description="Where it listens, such as http://127.0.0.1:8001.")
    vllm_api_key: SecretStr | None = Field(None, description="Its --api-key; better in the environment than as a flag.")
    served_model_name: str | None = Field(
        None, description="Name that requests ask for, one that it serves. Left out: the first of those."
    )
    max_num_seqs: int = Field(
        256,
        ge=1,
        description="Requests that it decodes at a time, at most: its own --max-num-seqs, which it does not tell.",
    )
    vllm_start_timeout_s: float = Field(
        1800.0, ge=1, le=86400, description="How long to wait for it, at start and when it is gone."
    )

    @field_validator("vllm_url")
    @classmethod
    def _is_plain_url(cls, value: str) -> str:
        return check_base_url(value)


def check_base_url(text: str) -> str:
    """``text``, when it is an address that paths can be put after. Raises ValueError."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as exc:
        raise ValueError("it is no URL: give one such as http://127.0.0.1:8001") from exc
    if parts.username is not None or parts.password is not None:
        raise ValueError("it has a user or a password in it: give the key with SPLITWISE_VLLM_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise ValueError("it is no http or https URL without a query: give one such as http://127.0.0.1:8001")
    return text.rstrip("/")


class TransferSettings(ExplicitSettings):
    """How KV blocks move between this instance and its peers."""

    cache_transfer_protocol: str = Field(
        "ipc,tcp",
        description="Transports in order of preference; ipc is shared memory on one host, tcp goes across. rdma beside "
        "others means: ipc on one host, else rdma, else, with a warning, tcp; rdma alone: nothing else.",
    )
    pd_comm_host: str | None = Field(
        None,
        description="Interface that peers' messengers connect to. Left out: that of --socket-ifname, or 127.0.0.1.",
    )
    pd_comm_advertise_host: str | None = Field(
        None, description="Address that peers are told to connect to. Left out: --pd-comm-host."
    )
    pd_comm_port: int = Field(0, ge=0, le=65535, description="Control port of the KV messenger; 0: any that is free.")
    kv_secret: SecretStr | None = Field(
        None, description="Shared by all instances of a topic: who does not know it gets no KV and gives none."
    )
    kv_checksum: Literal["none", "crc32", "xxh3"] = Field(
        "none",
        description="Check KV that arrives here by layer and block; a mismatch fails the transfer, and the request is "
        "run again. xxh3 is the fast one, from the extra 'checksum'.",
    )
    kv_cuda_thread_blocks: int = Field(
        0,
        ge=0,
        le=1 << 20,
        description="Of the GPU's copy kernel; fewer leave more to what computes beside. 0: its choice.",
    )
    kv_silence_s: float = Field(3.0, ge=0.1, le=600, description="A peer that is silent for so long is gone.")

    rdma_comm_ports: tuple[int, ...] = Field(
        (),
        description="Ports that RDMA peers connect to, one a rank (data x tensor parallel). Left out: free ones.",
    )
    rdma_nics: str | None = Field(
        None,
        description="RDMA devices: rank i takes the one at i modulo their number; or JSON by GPU, or a file with it. "
        "Left out: the nearest active ones (see rdma-nics).",
        json_schema_extra=also_known_as("KVCACHE_RDMA_NICS"),
    )
    disaggregation_ib_device: str | None = Field(None, description="The same, as SGLang calls it.")
    rdma_gid_index: int | None = Field(
        None,
        ge=0,
        le=1023,
        description="Which of a port's GIDs is used. Left out: a RoCE v2 one, IPv4 if there is.",
        json_schema_extra=also_known_as("KVCACHE_RDMA_GID_INDEX"),
    )
    ib_timeout: int = Field(
        18,
        ge=1,
        le=31,
        description="A NIC waits 4.096 us x 2^this for an answer, eight times, before it gives a connection up.",
        json_schema_extra=also_known_as("KVCACHE_IB_TIMEOUT"),
    )
    relax_ordering: bool = Field(
        False,
        description="Let the NIC write to memory out of order, which some hosts are faster with.",
        json_schema_extra=also_known_as("KVCACHE_RELAX_ORDERING"),
    )
    socket_ifname: str | None = Field(
        None,
        description="Network interface whose address stands for --pd-comm-host, and whose GIDs are preferred.",
        json_schema_extra=also_known_as("KVCACHE_SOCKET_IFNAME"),
    )
    rdma_queue_pairs: int = Field(2, ge=1, le=64, description="RDMA queue pairs to one peer.")
    rdma_mode: Literal["read", "write"] = Field(
        "read",
        description="How KV gets here by RDMA: this instance reads it out of prefill's memory, or has prefill write it "
        "into its own. Each decode instance chooses; prefill serves both.",
    )

    def options(self, num_ranks: int = 1) -> TransferOptions:
        """
        Args:
            num_ranks: of this instance.
        Raises:
            ConfigError: names the option.
        """
        if self.rdma_comm_ports and len(self.rdma_comm_ports) != num_ranks:
            raise ConfigError(
                f"--rdma-comm-ports names {len(self.rdma_comm_ports)} ports: give {num_ranks}, one for each rank of "
                "this instance (data parallel x tensor parallel), or leave it out for free ones"
            )
        if self.rdma_nics and self.disaggregation_ib_device:
            raise ConfigError("--rdma-nics and --disaggregation-ib-device mean the same: give one of them")
        try:
            protocols, optional = preferred_lanes(parse_protocols(self.cache_transfer_protocol))
            return TransferOptions(
                protocols=protocols,
                optional=optional,
                rdma=self._rdma_options(num_ranks),
                bind_host=self._bind_host,
                advertise_host=self.pd_comm_advertise_host,
                control_port=self.pd_comm_port,
                cuda=CudaOptions(thread_blocks=self.kv_cuda_thread_blocks),
                secret=None if self.kv_secret is None else self.kv_secret.get_secret_value(),
                silence_s=self.kv_silence_s,
                checksum=self.kv_checksum,
                heartbeat_s=min(1.0, self.kv_silence_s / 3),
            )
        except KVTransferError as exc:
            raise ConfigError(str(exc)) from exc

    @property
    def _bind_host(self) -> str:
        if self.pd_comm_host is not None:
            return self.pd_comm_host
        return "127.0.0.1" if self.socket_ifname is None else interface_address(self.socket_ifname)

    def _rdma_options(self, num_ranks: int) -> RdmaOptions:
        """Devices are put in rank order here: a list of names repeats, JSON says it for each."""
        names = parse_nics(self.rdma_nics or self.disaggregation_ib_device or "")
        by_rank = [names.for_rank(rank) for rank in range(num_ranks)]
        if any(by_rank) and not all(by_rank):
            raise ConfigError(f"--rdma-nics names no device for GPU {by_rank.index(None)}: name one for each, or none")
        return RdmaOptions(
            nics=tuple(name for name in by_rank if name),
            ports=self.rdma_comm_ports,
            gid_index=self.rdma_gid_index,
            netdev=self.socket_ifname,
            timeout_exponent=self.ib_timeout,
            relaxed_ordering=self.relax_ordering,
            queue_pairs=self.rdma_queue_pairs,
            mode=self.rdma_mode,
        )
