"""Runs a program that the kernel kills when the thread that started it ends, even by kill -9.

Usage: die_with_parent.py PARENT_PID PROGRAM ARGUMENT...

The program takes this process's place, so the caller's child is the program. A small script rather than a hook
between fork and exec: such a hook runs Python in a copy of a process with threads, whose locks may be held.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died before prctl: nobody would tell us any more.
    if os.getppid() != parent:
        sys.exit("the parent process is gone")
    os.execv(program, sys.argv[2:])


if __name__ == "__main__":
    main()
