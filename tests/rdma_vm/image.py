"""What the VM boots: a stock Debian kernel, a small initramfs, and packages that only the guest sees.

Everything is downloaded once by apt, unpacked (nothing is installed on this machine), and kept in a cache directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

GUEST_FILES = Path(__file__).parent / "guest"
# The "-cloud-" kernel lacks the InfiniBand modules.
KERNEL_PACKAGE = "linux-image-amd64"
GUEST_PACKAGES = (
    "busybox-static",
    "ibverbs-providers",
    "ibverbs-utils",
    "iproute2",
    "libbpf1",
    "libelf1",
    "libibumad3",
    "libibverbs1",
    "libmnl0",
    "libnl-3-200",
    "libnl-route-3-200",
    "libpci3",
    "librdmacm1",
    "libxtables12",
    "perftest",
    "python3-pyverbs",
)
MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "9pnet_virtio",
    "9p",
    "overlay",
    "crc32_generic",
    "bridge",
    "veth",
    "ib_uverbs",
    "ib_umad",
    "rdma_ucm",
    "rdma_rxe",
)
HOST_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "depmod": "kmod",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
DOWNLOAD_TIMEOUT_S = 300
_XZ_MAGIC = b"\xfd7zXZ\x00"


class ImageUnavailable(Exception):
    """The VM cannot be made ready here; says what is missing, and how to get it."""


@dataclass(frozen=True)
class Image:
    """Files of a VM that is ready to boot.

    Attributes:
        packages: directory that the guest sees on top of the host's root.
    """

    kernel: Path
    initramfs: Path
    packages: Path


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base, "splitwise-sched", "rdma-vm")


def missing_tools() -> list[str]:
    """Debian packages that this machine lacks."""
    paths = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return [package for tool, package in HOST_TOOLS.items() if shutil.which(tool, path=paths) is None]


def ready_image() -> Image:
    """The image, made now if it is not there yet.

    Raises:
        ImageUnavailable: a tool is missing, or a package cannot be downloaded.
    """
    if lacking := missing_tools():
        raise ImageUnavailable(f"the RDMA VM needs: apt-get install --no-install-recommends {' '.join(lacking)}")
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    image = Image(cache / "vmlinux", cache / "initramfs.cpio", cache / "packages")
    stamp, wanted = cache / "stamp", _fingerprint()
    with _locked(cache / "lock"):
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            stamp.unlink(missing_ok=True)
            _make(image)
            stamp.write_text(wanted, encoding="utf-8")
    return image


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint() -> str:
    """Of all that the image is made from, other than the packages' versions."""
    digest = hashlib.sha256(repr((KERNEL_PACKAGE, GUEST_PACKAGES, MODULES)).encode())
    for path in (Path(__file__), GUEST_FILES / "init.sh"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _make(image: Image) -> None:
    shutil.rmtree(image.packages, ignore_errors=True)
    with TemporaryDirectory(prefix="rdma-vm-") as made:
        scratch = Path(made)
        kernel_package = _dependency(KERNEL_PACKAGE)
        _download((kernel_package, *GUEST_PACKAGES), scratch)
        for deb in scratch.glob("*.deb"):
            is_kernel = deb.name.startswith(f"{kernel_package}_")
            _run("dpkg-deb", "-x", str(deb), str(scratch / "kernel" if is_kernel else image.packages))
        _merge_usr(image.packages)
        (vmlinuz,) = (scratch / "kernel/boot").glob("vmlinuz-*")
        image.kernel.write_bytes(_uncompressed_kernel(vmlinuz.read_bytes()))
        version = vmlinuz.name.removeprefix("vmlinuz-")
        _run("depmod", "-b", str(scratch / "kernel"), version)
        image.initramfs.write_bytes(_initramfs(scratch / "kernel/lib/modules" / version, image.packages))


def _dependency(package: str) -> str:
    """The one package that a meta-package stands for."""
    for line in _run("apt-cache", "depends", package).splitlines():
        if line.strip().startswith("Depends: linux-image-"):
            return line.split()[-1]
    raise ImageUnavailable(f"apt knows no {package}: apt-get update, on Debian or with its package lists")


def _download(packages: tuple[str, ...], directory: Path) -> None:
    try:
        _run("apt-get", "-qq", "download", *packages, cwd=directory, timeout_s=DOWNLOAD_TIMEOUT_S)
    except ImageUnavailable as exc:
        raise ImageUnavailable(f"{exc}; `apt-get update` may help") from exc


def _run(*command: str, cwd: Path | None = None, timeout_s: float = 120) -> str:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False,
            env={**os.environ, "PATH": path, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise ImageUnavailable(f"`{' '.join(command[:3])} ...` takes more than {timeout_s:g} s") from exc
    if done.returncode:
        raise ImageUnavailable(f"`{' '.join(command[:3])} ...` fails: {done.stderr.strip()[-500:]}")
    return done.stdout


def _merge_usr(root: Path) -> None:
    """Move /lib, /bin and /sbin below /usr, where they are on a merged system: a directory would hide its link."""
    for name in ("lib", "bin", "sbin"):
        if (root / name).is_dir():
            shutil.copytree(root / name, root / "usr" / name, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(root / name)


def _uncompressed_kernel(image: bytes) -> bytes:
    """The ELF inside a bzImage: unpacking it in the VM would take longer than booting it."""
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    begin = (setup_sectors + 1) * 512 + offset
    payload = image[begin : begin + length]
    if not payload.startswith(_XZ_MAGIC):
        raise ImageUnavailable("the kernel is not packed with xz: this runner knows Debian's kernels only")
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(payload)


def _initramfs(modules: Path, packages: Path) -> bytes:
    """busybox, the modules in the order in which they load, and init; a cpio archive, not compressed."""
    archive = _Cpio()
    for name in ("bin", "proc", "sys", "dev", "host", "packages", "rw", "newroot", "mods"):
        archive.add_directory(name)
    archive.add_file("bin/busybox", (packages / "usr/bin/busybox").read_bytes(), 0o755)
    ordered = _load_order(modules)
    for path in ordered:
        archive.add_file(f"mods/{path.name}", path.read_bytes(), 0o644)
    archive.add_file("mods/order", "".join(f"{path.name}\n" for path in ordered).encode(), 0o644)
    archive.add_file("init", (GUEST_FILES / "init.sh").read_bytes(), 0o755)
    return archive.finish()


def _load_order(modules: Path) -> list[Path]:
    """Files of all modules needed, each after what it depends on; what is built into the kernel is not among them."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text(encoding="utf-8").splitlines():
        path, _, rest = line.partition(":")
        # modules.dep lists dependencies in the reverse of the order in which they load.
        needs[path] = list(reversed(rest.split()))
    by_name = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}
    ordered: dict[str, None] = {}
    for name in MODULES:
        if name in by_name:
            ordered.update(dict.fromkeys([*needs[by_name[name]], by_name[name]]))
    return [modules / path for path in ordered]


class _Cpio:
    """Writes the archive format that the kernel unpacks (newc)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def add_directory(self, name: str) -> None:
        self._add(name, b"", stat.S_IFDIR | 0o755)

    def add_file(self, name: str, content: bytes, mode: int) -> None:
        self._add(name, content, stat.S_IFREG | mode)

    def finish(self) -> bytes:
        self._add("TRAILER!!!", b"", 0)
        return bytes(self._data)

    def _add(self, name: str, content: bytes, mode: int) -> None:
        self._inode += 1
        encoded = name.encode() + b"\x00"
        numbers = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        self._append(b"070701" + b"".join(b"%08X" % number for number in numbers) + encoded)
        self._append(content)

    def _append(self, piece: bytes) -> None:
        self._data += piece + bytes(-len(self._data + piece) % 4)
