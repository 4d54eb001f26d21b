"""What the guest's CPU is: this machine's own, through KVM, or one that qemu emulates."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

# linux/kvm.h
_KVM_GET_API_VERSION, _KVM_CREATE_VM = 0xAE00, 0xAE01
_KVM_API_VERSION = 12


@dataclass(frozen=True)
class Accelerator:
    """``accel`` and ``cpu`` are values of qemu's flags."""

    accel: str
    cpu: str
    description: str


KVM = Accelerator("kvm", "host", "the guest runs on this machine's CPU (KVM)")
# With erms the guest copies by "rep movsb", which is emulated byte by byte: packets took twice as long.
TCG = Accelerator("tcg,thread=multi,tb-size=256", "max,la57=off,erms=off", "the guest's CPU is emulated (TCG)")


def usable_accelerator() -> tuple[Accelerator, str]:
    """The faster one that works here, and why it is that."""
    obstacle = kvm_obstacle()
    return (KVM, "as /dev/kvm makes VMs") if obstacle is None else (TCG, f"as {obstacle}")


def kvm_obstacle(device: Path = Path("/dev/kvm"), cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Why KVM is of no use; None when it can be used."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        return f"{device} cannot be opened: {exc.strerror}"
    try:
        if (version := fcntl.ioctl(fd, _KVM_GET_API_VERSION)) != _KVM_API_VERSION:
            return f"{device} has version {version} of its interface, not {_KVM_API_VERSION}"
        os.close(fcntl.ioctl(fd, _KVM_CREATE_VM, 0))
    except OSError as exc:
        return f"{device} makes no VM: {exc.strerror}"
    finally:
        os.close(fd)
    if not {"vmx", "svm"} & _cpu_flags(cpuinfo):
        # Such a KVM (pvm) interprets the kernel of a guest, instruction by instruction, unless it was built for it.
        return f"{device} is there, but the CPU shows no hardware virtualization (vmx, svm)"
    return None


def _cpu_flags(cpuinfo: Path) -> set[str]:
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()
