"""Runs a command in a throw-away VM that has Soft-RoCE devices: ``python -m tests.rdma_vm.vm [flags] -- COMMAND ...``

The guest's root is this machine's, read-only under a layer of its own, so that the command finds the same Python, the
same working directory and the same environment; what it writes is gone afterwards, except below --writable. No KVM
is needed. Exit codes: the command's own; 124 when the time is up, 125 when the guest died, 126 when there is no image.
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

from tests.rdma_vm.image import GUEST_FILES, Image, ImageUnavailable, ready_image

EXIT_TIMEOUT, EXIT_GUEST_DIED, EXIT_NO_IMAGE = 124, 125, 126
KERNEL_FLAGS = (
    "console=ttyS0 panic=-1 quiet loglevel=5 mitigations=off nopti nokaslr audit=0 random.trust_cpu=on "
    "no_timer_check cryptomgr.notests nowatchdog"
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
    job = Path(tempfile.mkdtemp(prefix="rdma-vm-job-"))
    try:
        _write_job(job, command, machine)
        # qemu takes over no descriptor below 3.
        outputs = [os.dup(stream.fileno()) for stream in (sys.stdout, sys.stderr)]
        try:
            with (job / "qemu.log").open("wb") as log:
                qemu = subprocess.Popen(
                    _qemu_command(machine, image, job, outputs),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=outputs,
                )
        finally:
            for fd in outputs:
                os.close(fd)
        timed_out = _wait(qemu, machine.timeout_s)
        code_file = job / "exit-code"
        if machine.is_verbose:
            _show(job)
        if code_file.exists() and (code := code_file.read_text(encoding="ascii").strip()):
            return int(code)
        if not machine.is_verbose:
            _show(job)
        print(f"rdma-vm: {'time is up' if timed_out else 'the guest died'}", file=sys.stderr)
        return EXIT_TIMEOUT if timed_out else EXIT_GUEST_DIED
    finally:
        shutil.rmtree(job, ignore_errors=True)


def _wait(qemu: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Whether the time was up. However it ends, the VM is gone afterwards."""
    try:
        qemu.wait(timeout_s)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        if qemu.poll() is None:
            qemu.kill()
            qemu.wait()


def _write_job(job: Path, command: Sequence[str], machine: Machine) -> None:
    shutil.copy(GUEST_FILES / "setup.sh", job)
    variables = {**os.environ, "RDMA_VM_NICS": str(machine.num_nics), "SPLITWISE_RDMA_VM": "1"}
    exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in variables.items() if k.isidentifier())
    (job / "environment.sh").write_text(exports, encoding="utf-8")
    text = f"cd {shlex.quote(os.getcwd())} || exit 126\nexec {shlex.join(command)}\n"
    (job / "command.sh").write_text(text, encoding="utf-8")
    (job / "mounts").write_text("".join(f"rw{i} {path}\n" for i, path in enumerate(machine.writable)), encoding="utf-8")


def _qemu_command(machine: Machine, image: Image, job: Path, outputs: Sequence[int]) -> list[str]:
    """``outputs`` are descriptors for stdout and stderr.

    TCG only: KVM is not to be had in most containers, and the guest's CPU must be the same everywhere.
    """

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
        "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,la57=off",
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
            print(f"rdma-vm: {name}:\n{text[-4000:]}", file=sys.stderr)


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
        print(f"rdma-vm: {exc}", file=sys.stderr)
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
        print(f"rdma-vm: {time.monotonic() - began:.1f} s", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
