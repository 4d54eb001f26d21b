"""``kv_connector_extra_config``: what a user may choose of the connector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kv_transfer.errors import InvalidOptions
from kv_transfer.options import CudaOptions, RdmaOptions, TransferOptions, parse_protocols
from splitwise_sched.errors import ConfigError

TRANSFER_NAMES = {f.name for f in fields(TransferOptions)}
OWN_NAMES = ("transfer_timeout_s", "endpoint_dir")


@dataclass(frozen=True, slots=True)
class ConnectorOptions:
    """
    Attributes:
        transfer_timeout_s: from the opening of a transfer to its end; how long prefill keeps blocks that decode never
            asks for.
        endpoint_dir: where each worker writes how its rank is reached, as ``rank-<n>``; None: nowhere.
    """

    transfer: TransferOptions = field(default_factory=TransferOptions)
    transfer_timeout_s: float = 120.0
    endpoint_dir: str | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> ConnectorOptions:
        """
        Raises:
            ConfigError: names the option that is unknown or has a value that cannot be.
        """
        values = dict(raw)
        if unknown := sorted(values.keys() - TRANSFER_NAMES - set(OWN_NAMES)):
            known = ", ".join(sorted((*TRANSFER_NAMES, *OWN_NAMES)))
            raise ConfigError(f"kv_connector_extra_config has {unknown[0]!r}: known are {known}")
        timeout = values.pop("transfer_timeout_s", 120.0)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 1 <= timeout <= 86_400:
            raise ConfigError(f"transfer_timeout_s is {timeout!r}: give seconds from 1 to 86400")
        directory = values.pop("endpoint_dir", None)
        if directory is not None and not isinstance(directory, str):
            raise ConfigError(f"endpoint_dir is {directory!r}: give the path of a directory")
        protocols = values.get("protocols")
        if isinstance(protocols, str):
            values["protocols"] = parse_protocols(protocols)
        elif isinstance(protocols, list):
            values["protocols"] = tuple(map(str, protocols))
        try:
            for name, kind in (("rdma", RdmaOptions), ("cuda", CudaOptions)):
                if name in values:
                    values[name] = _nested(name, values[name], kind)
            return cls(TransferOptions(**values), float(timeout), directory)
        except (InvalidOptions, TypeError) as exc:
            raise ConfigError(f"kv_connector_extra_config: {exc}") from exc


def _nested(name: str, raw: object, kind: type[RdmaOptions] | type[CudaOptions]) -> RdmaOptions | CudaOptions:
    """Raises ConfigError; InvalidOptions or TypeError for what is in it."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"kv_connector_extra_config: {name} is {raw!r}: give an object")
    known = sorted(f.name for f in fields(kind))
    if unknown := sorted(raw.keys() - set(known)):
        raise ConfigError(f"kv_connector_extra_config: {name} has {unknown[0]!r}: known are {', '.join(known)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    return kind(**values)
