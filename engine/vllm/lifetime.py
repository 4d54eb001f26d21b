"""vLLM's processes end with the process that started them, also when that is killed.

vLLM does not see to that: its engine and its resource tracker stay behind, with the model in memory. On Linux the
kernel does it; elsewhere nothing happens here.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

VARIABLE = "SPLITWISE_VLLM_ENDS_WITH_PARENT"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def ask_children() -> None:
    """Of vLLM's processes that this one's main thread starts from here on, and of theirs."""
    os.environ[VARIABLE] = "1"
    # A fork has this process's plugins loaded already, and would be asked only when its model is. And it is what
    # vLLM's own command line does: there are threads here, whose locks a fork would find held.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def end_with_parent() -> None:
    """Of this process, if it is one of vLLM's, and was asked to by ``ask_children`` or by the environment."""
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(VARIABLE) != "1" or sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died before prctl: nobody would tell us any more.
    if os.getppid() != parent.pid:
        os.kill(os.getpid(), signal.SIGKILL)
