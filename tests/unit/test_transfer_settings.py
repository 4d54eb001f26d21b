"""What the flags of KV transfer mean, by whichever name they are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.settings import TransferSettings
from kv_transfer.errors import InvalidOptions
from kv_transfer.interfaces import interface_address
from kv_transfer.options import RdmaOptions, TransferOptions, preferred_lanes
from splitwise_sched.configuration import load
from splitwise_sched.errors import ConfigError


def settings(*, environ: dict[str, str] | None = None, files: tuple[Path, ...] = (), **flags: str) -> TransferSettings:
    (found,) = load((TransferSettings,), flags=flags, environ=environ or {}, files=files)
    assert isinstance(found, TransferSettings)
    return found


@pytest.mark.parametrize(
    ("named", "lanes", "optional"),
    [
        (("ipc", "tcp"), ("ipc", "tcp"), ()),
        (("tcp", "ipc"), ("tcp", "ipc"), ()),
        (("rdma",), ("rdma",), ()),
        (("rdma", "ipc"), ("ipc", "rdma", "tcp"), ("rdma",)),
        (("ipc", "rdma"), ("ipc", "rdma", "tcp"), ("rdma",)),
        (("rdma", "tcp"), ("rdma", "tcp"), ("rdma",)),
        (("tcp", "rdma", "shm"), ("shm", "rdma", "tcp"), ("rdma",)),
    ],
)
def test_rdma_beside_others_comes_after_ipc_and_before_tcp(
    named: tuple[str, ...], lanes: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    assert preferred_lanes(named) == (lanes, optional)


def test_variables_of_fastdeploy_are_known() -> None:
    environ = {
        "KVCACHE_RDMA_NICS": "mlx5_0,mlx5_1",
        "KVCACHE_RDMA_GID_INDEX": "3",
        "KVCACHE_IB_TIMEOUT": "14",
        "KVCACHE_RELAX_ORDERING": "1",
        "KVCACHE_SOCKET_IFNAME": "lo",
    }
    options = settings(environ=environ, cache_transfer_protocol="rdma,ipc").options()
    assert options.rdma == RdmaOptions(("mlx5_0",), (), 3, "lo", 14, True)
    assert options.bind_host == "127.0.0.1"
    assert (options.protocols, options.optional) == (("ipc", "rdma", "tcp"), ("rdma",))


def test_the_projects_own_variable_wins_over_the_foreign_one_and_a_flag_over_both() -> None:
    environ = {"KVCACHE_IB_TIMEOUT": "14", "SPLITWISE_IB_TIMEOUT": "15"}
    assert settings(environ=environ).ib_timeout == 15
    assert settings(environ=environ, ib_timeout="16").ib_timeout == 16


def test_a_foreign_variable_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "kv.env"
    file.write_text("KVCACHE_RDMA_NICS=mlx5_3\n")
    assert settings(files=(file,)).rdma_nics == "mlx5_3"


def test_a_wrong_value_is_blamed_on_the_variable_that_gave_it() -> None:
    with pytest.raises(ConfigError, match=r"variable KVCACHE_IB_TIMEOUT is '99': it must be a whole number between 1"):
        settings(environ={"KVCACHE_IB_TIMEOUT": "99"})


@pytest.mark.parametrize(
    ("text", "nics"),
    [
        ("mlx5_0", ("mlx5_0", "mlx5_0")),
        ("mlx5_0,mlx5_1,mlx5_2", ("mlx5_0", "mlx5_1")),
        ('{"0": "mlx5_4", "1": "mlx5_5"}', ("mlx5_4", "mlx5_5")),
    ],
)
def test_sglangs_flag_names_devices_in_all_its_forms(text: str, nics: tuple[str, ...]) -> None:
    assert settings(disaggregation_ib_device=text).options(num_ranks=2).rdma.nics == nics


def test_json_that_leaves_a_gpu_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="no device for GPU 1"):
        settings(disaggregation_ib_device='{"0": "mlx5_4"}').options(num_ranks=2)


def test_both_names_of_the_devices_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="mean the same"):
        settings(rdma_nics="mlx5_0", disaggregation_ib_device="mlx5_1").options()


@pytest.mark.parametrize(("ports", "ranks"), [("7001,7002", 1), ("7001", 2)])
def test_a_wrong_number_of_ports_says_the_right_one(ports: str, ranks: int) -> None:
    with pytest.raises(ConfigError, match=rf"names {len(ports.split(','))} ports: give {ranks}, one for each rank"):
        settings(rdma_comm_ports=ports).options(num_ranks=ranks)


def test_ports_are_taken_in_rank_order() -> None:
    assert settings(rdma_comm_ports="7001,7002").options(num_ranks=2).rdma.ports == (7001, 7002)
    with pytest.raises(ConfigError, match=r"rdma\.ports: is 70000"):
        settings(rdma_comm_ports="70000").options()


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    assert interface_address("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"'nowhere0': there is no such interface; those that are: .*lo"):
        settings(socket_ifname="nowhere0").options()


def test_the_mode_of_rdma_is_read_unless_one_asks_for_write() -> None:
    assert settings().options().rdma.mode == "read"
    assert settings(environ={"SPLITWISE_RDMA_MODE": "write"}).options().rdma.mode == "write"
    with pytest.raises(ConfigError, match=r"rdma.mode"):
        settings(rdma_mode="push")
    with pytest.raises(InvalidOptions, match=r"rdma\.mode: is 'push': known are read, write"):
        RdmaOptions(mode="push")


@pytest.mark.parametrize(
    "wrong", [{"queue_pairs": 0}, {"queue_depth": 0}, {"timeout_exponent": 0}, {"gid_index": -1}, {"max_read_bytes": 1}]
)
def test_rdma_options_that_cannot_work_are_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidOptions, match=f"rdma.{next(iter(wrong))}"):
        TransferOptions(rdma=RdmaOptions(**wrong))  # type: ignore[arg-type]
