"""Runs a command in a throw-away VM that has Soft-RoCE devices: ``python -m tests.rdma_vm.vm [flags] -- COMMAND ...``

The guest's root is this machine's, read-only under a layer of its own, so that the command finds the same Python, the
same working directory and the same environment; what it writes is gone afterwards, except below --writable. Where KVM
can be used the guest has this machine's CPU, elsewhere an emulated one, on which Python is 30 times slower; stderr says
which. Exit codes: the command's own; 124 when the time is up, 125 when the guest died, 126 when there is no image.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.rdma_vm.accelerator import TCG, Accelerator, usable_accelerator
from tests.rdma_vm.image import GUEST_FILES, Image, ImageUnavailable, ready_image

EXIT_TIMEOUT, EXIT_GUEST_DIED, EXIT_NO_IMAGE = 124, 125, 126
# On a busy host; usually it takes a second.
KVM_BOOT_TIMEOUT_S = 60.0
# An emulated guest takes its TSC for unreliable, and then asks a device (HPET) for the time; where libraries lie at the
# same address in every process, what was translated for one serves the next. Together a third of Python's start.
KERNEL_FLAGS = (
    "console=ttyS0 panic=-1 quiet loglevel=5 mitigations=off nopti nokaslr audit=0 random.trust_cpu=on "
    "no_timer_check cryptomgr.notests nowatchdog tsc=reliable norandmaps"
)


@dataclass(frozen=True)
class Machine:
    """What the VM is made of."""

    num_nics: int = 2
    num_cpus: int = 2
    memory_mib: int = 2048
    timeout_s: float = 300.0
    writable: tuple[Path, ...] = ()
    is_verbose: bool = False


def run(command: Sequence[str], machine: Machine, image: Image) -> int:
    """Boot, run, relay output, end; the exit code."""
    accelerator, reason = usable_accelerator()
    _say(f"{accelerator.description}, {reason}")
    code, has_booted = _run_on(accelerator, command, machine, image)
    if not has_booted and accelerator is not TCG:
        # A KVM within another hypervisor may make VMs, and carry none of them to its end.
        _say(f"the guest does not boot; once more: {TCG.description}")
        code, _ = _run_on(TCG, command, machine, image)
    return code


def _run_on(accelerator: Accelerator, command: Sequence[str], machine: Machine, image: Image) -> tuple[int, bool]:
    """The exit code, and whether the guest came to the command."""
    job = Path(tempfile.mkdtemp(prefix="rdma-vm-job-"))
    try:
        _write_job(job, command, machine)
        # qemu takes over no descriptor below 3.
        outputs = [os.dup(stream.fileno()) for stream in (sys.stdout, sys.stderr)]
        try:
            with (job / "qemu.log").open("wb") as log:
                qemu = subprocess.Popen(
                    _qemu_command(machine, accelerator, image, job, outputs),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=outputs,
                )
        finally:
            for fd in outputs:
                os.close(fd)
        boot_timeout_s = machine.timeout_s if accelerator is TCG else min(KVM_BOOT_TIMEOUT_S, machine.timeout_s)
        timed_out = _wait(qemu, job / "started", boot_timeout_s, machine.timeout_s)
        code_file = job / "exit-code"
        if machine.is_verbose:
            _show(job)
        if code_file.exists() and (code := code_file.read_text(encoding="ascii").strip()):
            return int(code), True
        if not machine.is_verbose:
            _show(job)
        _say("time is up" if timed_out else "the guest died")
        return EXIT_TIMEOUT if timed_out else EXIT_GUEST_DIED, (job / "started").exists()
    finally:
        shutil.rmtree(job, ignore_errors=True)


def _wait(qemu: subprocess.Popen[bytes], started: Path, boot_timeout_s: float, timeout_s: float) -> bool:
    """Whether the time was up. However it ends, the VM is gone afterwards.

    Args:
        started: a file that is there once the guest has booted.
        timeout_s: of boot and command.
    """
    until = time.monotonic() + timeout_s
    try:
        try:
            qemu.wait(boot_timeout_s)
        except subprocess.TimeoutExpired:
            if not started.exists():
                raise
            qemu.wait(max(0.0, until - time.monotonic()))
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        if qemu.poll() is None:
            qemu.kill()
            qemu.wait()


def _say(text: str) -> None:
    print(f"rdma-vm: {text}", file=sys.stderr, flush=True)


def _write_job(job: Path, command: Sequence[str], machine: Machine) -> None:
    shutil.copy(GUEST_FILES / "setup.sh", job)
    variables = {**os.environ, "RDMA_VM_NICS": str(machine.num_nics), "SPLITWISE_RDMA_VM": "1"}
    exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in variables.items() if k.isidentifier())
    (job / "environment.sh").write_text(exports, encoding="utf-8")
    text = f"cd {shlex.quote(os.getcwd())} || exit 126\nexec {shlex.join(command)}\n"
    (job / "command.sh").write_text(text, encoding="utf-8")
    (job / "mounts").write_text("".join(f"rw{i} {path}\n" for i, path in enumerate(machine.writable)), encoding="utf-8")


def _qemu_command(
    machine: Machine, accelerator: Accelerator, image: Image, job: Path, outputs: Sequence[int]
) -> list[str]:
    """``outputs`` are descriptors for stdout and stderr."""

    def share(tag: str, path: Path | str, *options: str) -> list[str]:
        fsdev = ",".join((f"local,id={tag},path={path},security_model=none", *options))
        return ["-fsdev", fsdev, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]

    def port(name: str, fd: int, number: int) -> list[str]:
        return [
            "-add-fd", f"fd={fd},set={number}",
            "-chardev", f"file,id={name},path=/dev/fdset/{number},append=on",
            "-device", f"virtserialport,chardev={name},nr={number},name={name}",
        ]  # fmt: skip

    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35",
        "-accel", accelerator.accel, "-cpu", accelerator.cpu,
        "-smp", str(machine.num_cpus), "-m", str(machine.memory_mib),
        "-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", KERNEL_FLAGS,
        "-serial", f"file:{job / 'console.log'}",
        *share("host", "/", "readonly=on", "multidevs=remap"),
        *share("packages", image.packages, "readonly=on"),
        *share("job", job),
        *(word for i, path in enumerate(machine.writable) for word in share(f"rw{i}", path)),
        "-device", "virtio-serial-pci",
        *port("stdout", outputs[0], 1),
        *port("stderr", outputs[1], 2),
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
    ]  # fmt: skip


def _show(job: Path) -> None:
    for name in ("console.log", "qemu.log", "setup.log"):
        path = job / name
        if path.exists() and (text := path.read_text(encoding="utf-8", errors="replace").strip()):
            _say(f"{name}:\n{text[-4000:]}")


def main() -> int:
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--nics", type=int, default=Machine.num_nics, help="Soft-RoCE devices rxe0, rxe1 ...")
    flags.add_argument("--cpus", type=int, default=Machine.num_cpus)
    flags.add_argument("--memory-mib", type=int, default=Machine.memory_mib)
    flags.add_argument("--timeout-s", type=float, default=Machine.timeout_s, help="the VM is ended after that")
    flags.add_argument("--writable", type=Path, action="append", default=[], metavar="DIR", help="kept what is written")
    flags.add_argument("-v", "--verbose", action="store_true", help="show the guest's console and the times")
    flags.add_argument("command", nargs="+")
    args = flags.parse_args()
    # SIGTERM unwinds, so that the VM ends too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        image = ready_image()
    except ImageUnavailable as exc:
        _say(str(exc))
        return EXIT_NO_IMAGE
    machine = Machine(
        num_nics=args.nics,
        num_cpus=args.cpus,
        memory_mib=args.memory_mib,
        timeout_s=args.timeout_s,
        writable=tuple(path.resolve() for path in args.writable),
        is_verbose=args.verbose,
    )
    code = run(args.command, machine, image)
    if args.verbose:
        _say(f"{time.monotonic() - began:.1f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
