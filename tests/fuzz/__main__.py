"""Coverage-guided fuzzing of one target after the other: ``python -m tests.fuzz [--seconds N] [TARGET ...]``.

Needs atheris (pip install atheris). Each target runs in a process of its own with at most 2 GiB and 10 s an input; a
find leaves its input as a file, which the output names, and ends with exit code 1.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def fuzz_one(name: str, seconds: int, corpus: Path) -> None:
    """Does not return: libFuzzer ends the process. Inputs that were of interest, and finds, are in ``corpus``."""
    import atheris

    with atheris.instrument_imports(include=["splitwise_sched", "kv_transfer", "engine"]):
        from tests.fuzz.targets import TARGETS

    for number, seed in enumerate(TARGETS[name].seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    limits = (
        f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=65536",
        "-verbosity=0", "-print_final_stats=1",
    )  # fmt: skip
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={corpus}/", str(corpus)], TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    flags.add_argument("--seconds", type=int, default=60, help="time for each target")
    flags.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    flags.add_argument("targets", nargs="*")
    args = flags.parse_args()
    if args.corpus is not None:
        fuzz_one(args.targets[0], args.seconds, args.corpus)
    from tests.fuzz.targets import TARGETS

    found = []
    for name in args.targets or TARGETS:
        corpus = tempfile.mkdtemp(prefix=f"splitwise-fuzz-{name}-")
        command = [sys.executable, "-m", "tests.fuzz", "--corpus", corpus, "--seconds", str(args.seconds), name]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        runs = [line for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units")]
        count = f"{runs[-1].split()[-1]} inputs" if runs else "?"
        print(f"{name}: {'well' if done.returncode == 0 else 'FOUND SOMETHING'}, {count}", flush=True)
        if done.returncode:
            found.append(name)
            print(done.stdout[-4000:], done.stderr[-4000:])
        else:
            shutil.rmtree(corpus)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
