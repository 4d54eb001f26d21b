"""When the RDMA tests' VM uses KVM, and what it says when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rdma_vm.accelerator import kvm_obstacle


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    return tmp_path / "cpuinfo"


def test_without_the_device_or_with_one_that_is_none_the_reason_is_told(cpuinfo: Path) -> None:
    assert kvm_obstacle(Path("/dev/none"), cpuinfo) == "/dev/none cannot be opened: No such file or directory"
    reason = kvm_obstacle(Path("/dev/null"), cpuinfo)
    assert reason is not None and reason.startswith("/dev/null makes no VM: ")


def test_a_device_without_hardware_virtualization_behind_it_is_not_used(cpuinfo: Path) -> None:
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu svm sse2\n\nflags\t\t: fpu\n")
    if (reason := kvm_obstacle(cpuinfo=cpuinfo)) is not None:
        pytest.skip(reason)
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2\n")
    reason = kvm_obstacle(cpuinfo=cpuinfo)
    assert reason is not None and "shows no hardware virtualization" in reason
