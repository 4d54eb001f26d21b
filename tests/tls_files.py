"""Certificates for tests, made by openssl: two CAs that know nothing of each other, and what each of them signs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_DAYS = 2


@dataclass(frozen=True)
class Identity:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """A CA of its own, with its files in ``directory``."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self.certificate, self._key = directory / f"{name}.crt", directory / f"{name}.key"
        _openssl("req", "-x509", *_new_key(self._key), "-subj", f"/CN={name}", "-days", _DAYS, "-out", self.certificate)

    def sign(self, name: str, alternatives: str = "IP:127.0.0.1,DNS:localhost", days: int = _DAYS) -> Identity:
        """A certificate for ``alternatives``; with ``days`` below 0, one that has expired."""
        stem = self._directory / f"{self._name}-{name}"
        request, extensions = stem.with_suffix(".csr"), stem.with_suffix(".ext")
        made = Identity(stem.with_suffix(".crt"), stem.with_suffix(".key"))
        extensions.write_text(f"subjectAltName={alternatives}\n")
        _openssl("req", *_new_key(made.key), "-subj", f"/CN={name}", "-out", request)
        _openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
                 "-extfile", extensions, "-days", days, "-out", made.certificate)  # fmt: skip
        return made


def server_lines(authority: Authority, identity: Identity, *, auth_clients: str = "no") -> dict[str, object]:
    """A server's configuration that shows ``identity``; clients' certificates are to be signed by ``authority``."""
    return {
        "tls-cert-file": identity.certificate,
        "tls-key-file": identity.key,
        "tls-ca-cert-file": authority.certificate,
        "tls-auth-clients": auth_clients,
    }


def client_options(authority: Authority, identity: Identity | None = None) -> dict[str, object]:
    """For redis-py."""
    own = {} if identity is None else {"ssl_certfile": str(identity.certificate), "ssl_keyfile": str(identity.key)}
    return {"ssl": True, "ssl_ca_certs": str(authority.certificate), **own}


def _new_key(path: Path) -> tuple[object, ...]:
    return "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", path


def _openssl(*arguments: object) -> None:
    run = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
