"""The plugin that vLLM loads in each of its processes, at their start."""

from __future__ import annotations

from engine.vllm.lifetime import end_with_parent

CONNECTOR = "SplitwiseConnector"


def set_up() -> None:
    """Make the connector known by its name, and end with whoever started this process. May be called again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    end_with_parent()
    # The connector's module is imported when a configuration names it, and not before.
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "engine.vllm.connector", CONNECTOR)
