"""TLS to Redis: it carries everything, and what is wrong about it is said in a paragraph."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from splitwise_sched.errors import ConfigError, StoreUnavailable
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Role
from tests.conftest import missing
from tests.integration.toy import ToyInstance, request_of, tokens_of, toy_answer
from tests.redis_rigs import Cluster, RedisServer, SentinelTrio, server_programs
from tests.tls_files import Authority, Identity, client_options, server_lines


@dataclass(frozen=True)
class Certificates:
    authority: Authority
    stranger: Authority
    server: Identity
    client: Identity


@pytest.fixture(scope="module")
def program() -> str:
    """A server with TLS: the wheels have none."""
    found = server_programs().get("PATH")
    if found is None or shutil.which("openssl") is None:
        missing("no redis-server on PATH, or no openssl", is_expected=False)
    return found


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("tls")
    authority, stranger = Authority(directory, "ca"), Authority(directory, "stranger")
    return Certificates(authority, stranger, authority.sign("server"), authority.sign("client"))


@pytest.fixture(scope="module")
def tls_server(program: str, certificates: Certificates) -> Iterator[RedisServer]:
    """Asks nobody for a certificate."""
    lines = server_lines(certificates.authority, certificates.server)
    with RedisServer(program, tls=lines, client_options=client_options(certificates.authority)) as server:
        yield server


@pytest.fixture(scope="module")
def mutual_server(program: str, certificates: Certificates) -> Iterator[RedisServer]:
    """Wants a client's certificate."""
    lines = server_lines(certificates.authority, certificates.server, auth_clients="yes")
    options = client_options(certificates.authority, certificates.client)
    with RedisServer(program, tls=lines, client_options=options) as server:
        yield server


def tls_settings(rig: Any, topic: str, authority: Authority | None, **more: Any) -> SchedulerSettings:
    fields = {"scheduler_topic": topic, "scheduler_tls": True, "instance_lease_s": 1.0, **rig.settings_fields(), **more}
    if authority is not None:
        fields["scheduler_tls_ca"] = authority.certificate
    return SchedulerSettings(**fields)


def own(identity: Identity) -> dict[str, Path]:
    return {"scheduler_tls_cert": identity.certificate, "scheduler_tls_key": identity.key}


async def start_and_serve(settings: SchedulerSettings) -> None:
    async with (
        ToyInstance(settings, Role.PREFILL, "p0"),
        ToyInstance(settings, Role.DECODE, "d0"),
        FrontEnd(settings) as frontend,
    ):
        requests = [request_of(f"r{i}") for i in range(5)]
        for request in requests:
            assert await tokens_of(await frontend.submit(request)) == toy_answer(request)


async def test_requests_are_served_over_tls(tls_server, certificates, topic):
    await start_and_serve(tls_settings(tls_server, topic, certificates.authority))


async def test_requests_are_served_to_who_shows_the_certificate_that_the_server_wants(
    mutual_server, certificates, topic
):
    await start_and_serve(tls_settings(mutual_server, topic, certificates.authority, **own(certificates.client)))


async def test_sentinels_and_the_master_are_spoken_to_by_tls(program, certificates, topic):
    lines = server_lines(certificates.authority, certificates.server)
    with SentinelTrio(program, tls=lines, client_options=client_options(certificates.authority)) as trio:
        await start_and_serve(tls_settings(trio, topic, certificates.authority))
        plain = SchedulerSettings(scheduler_topic=topic, **trio.settings_fields())
        with pytest.raises(ConfigError, match="speaks TLS: add --scheduler-tls"):
            await FrontEnd(plain).start()


async def test_cluster_nodes_are_spoken_to_by_tls(program, certificates, topic):
    lines = server_lines(certificates.authority, certificates.server)
    with Cluster(program, topic=topic, tls=lines, client_options=client_options(certificates.authority)) as cluster:
        await start_and_serve(tls_settings(cluster, topic, certificates.authority))
        strange = tls_settings(cluster, topic, certificates.stranger)
        with pytest.raises(ConfigError, match="cannot be trusted"):
            await FrontEnd(strange).start()


@pytest.mark.parametrize("trusted", ["another", "the system's"])
async def test_a_wrong_ca_is_named_with_what_to_give(tls_server, certificates, topic, trusted):
    authority = certificates.stranger if trusted == "another" else None
    with pytest.raises(ConfigError) as refused:
        await FrontEnd(tls_settings(tls_server, topic, authority)).start()
    said = str(refused.value)
    assert f"127.0.0.1:{tls_server.port}" in said and "cannot be trusted" in said and "--scheduler-tls-ca" in said
    assert ("stranger.crt" if authority is not None else "the system's CAs") in said


async def test_a_certificate_for_another_name_is_refused_unless_told_otherwise(program, certificates, topic):
    elsewhere = certificates.authority.sign("elsewhere", "DNS:redis.example")
    lines = server_lines(certificates.authority, elsewhere)
    options = {**client_options(certificates.authority), "ssl_check_hostname": False}
    with RedisServer(program, tls=lines, client_options=options) as server:
        with pytest.raises(ConfigError, match=r"certificate for another name .*--no-scheduler-tls-check-hostname"):
            await FrontEnd(tls_settings(server, topic, certificates.authority)).start()
        trusting = tls_settings(server, topic, certificates.authority, scheduler_tls_check_hostname=False)
        async with FrontEnd(trusting) as frontend:
            assert frontend.healthy


async def test_a_certificate_that_has_expired_is_said_to_have(program, certificates, topic):
    expired = certificates.authority.sign("expired", days=-1)
    options = {**client_options(certificates.authority), "ssl_cert_reqs": "none"}
    lines = server_lines(certificates.authority, expired)
    with (
        RedisServer(program, tls=lines, client_options=options) as server,
        pytest.raises(ConfigError, match=r"not valid now .*expired.*renew it"),
    ):
        await FrontEnd(tls_settings(server, topic, certificates.authority)).start()


@pytest.mark.parametrize("which", ["none", "a stranger's"])
async def test_a_client_certificate_that_is_missing_or_wrong_is_asked_for(mutual_server, certificates, topic, which):
    given = {} if which == "none" else own(certificates.stranger.sign("client"))
    with pytest.raises(ConfigError) as refused:
        await FrontEnd(tls_settings(mutual_server, topic, certificates.authority, **given)).start()
    said = str(refused.value)
    assert "refuses this client's certificate" in said and "--scheduler-tls-cert" in said
    assert ("stranger-client.crt" in said) is bool(given)


async def test_tls_with_a_server_that_has_none_is_said_so(redis_server, topic, certificates):
    with pytest.raises(ConfigError, match=rf"127.0.0.1:{redis_server.port} does not speak TLS .*--scheduler-tls"):
        await FrontEnd(tls_settings(redis_server, topic, certificates.authority)).start()


async def test_no_tls_with_a_server_that_wants_it_is_said_so(tls_server, mutual_server, topic):
    for server in (tls_server, mutual_server):
        settings = SchedulerSettings(scheduler_topic=topic, **server.settings_fields())
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{server.port} speaks TLS: add --scheduler-tls"):
            await FrontEnd(settings).start()


async def test_nobody_there_is_said_so_with_tls_too(tls_server, certificates, topic):
    settings = tls_settings(tls_server, topic, certificates.authority).model_copy(update={"scheduler_port": 1})
    with pytest.raises(StoreUnavailable, match=r"no Redis or Valkey answers at 127\.0\.0\.1:1 "):
        await FrontEnd(settings).start()


@pytest.mark.parametrize(
    ("field", "said"),
    [("scheduler_tls_ca", "is no file with CA certificates"), ("scheduler_tls_cert", "are no certificate and its key")],
)
@pytest.mark.parametrize("content", [None, "no certificate"])
def test_files_that_are_of_no_use_are_named_before_anybody_is_connected_to(
    tmp_path, certificates, field, said, content
):
    path = tmp_path / "file.pem"
    if content is not None:
        path.write_text(content)
    fields = {"scheduler_tls_ca": certificates.authority.certificate, **own(certificates.client), field: path}
    with pytest.raises(ConfigError, match=said) as refused:
        FrontEnd(SchedulerSettings(scheduler_host="127.0.0.1", scheduler_tls=True, **fields))
    assert str(path) in str(refused.value)


def test_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(tmp_path, certificates, topic):
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-in", certificates.client.key, "-aes256", "-passout", "pass:x", "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    fields = {"scheduler_tls_cert": certificates.client.certificate, "scheduler_tls_key": locked}
    with pytest.raises(ConfigError, match="without a passphrase"):
        FrontEnd(SchedulerSettings(scheduler_host="127.0.0.1", scheduler_tls=True, scheduler_topic=topic, **fields))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scheduler_tls_ca": "ca.crt"}, "--scheduler-tls-ca given without --scheduler-tls"),
        ({"scheduler_tls": True, "scheduler_tls_cert": "c"}, "--scheduler-tls-key go together"),
        ({"scheduler_tls": True, "scheduler_host": "/run/redis.sock"}, "unix socket"),
        ({"scheduler_host": "rediss://redis:6379"}, "it is a URL"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        SchedulerSettings(**given)
