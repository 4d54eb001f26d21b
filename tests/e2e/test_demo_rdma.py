"""The demo over RDMA, in the VM with Soft-RoCE devices (`make test-rdma`): two addresses, a device behind each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A GGUF file, made outside the VM (tests/rdma_vm/suite.py). The engine is llama.cpp: on an emulated CPU, importing
# transformers takes minutes in each process.
MODEL = os.environ.get("RDMA_VM_MODEL")
TIMEOUT_S = int(os.environ.get("RDMA_VM_TIMEOUT_S", "600"))

# On a host with other work, a chunk of a prompt takes longer there than an instance may usually stand still.
LEASE_S = 60

pytestmark = [
    pytest.mark.rdma,
    pytest.mark.skipif(MODEL is None, reason="runs in the VM: make test-rdma"),
    pytest.mark.timeout(TIMEOUT_S),
]

# tests/rdma_vm/guest/setup.sh gives a device's interface this address.
PREFILL, DECODE = "10.77.0.1", "10.77.0.2"
# Payload of the largest packet.
MTU_BYTES = 4096


def received_packets(device: str) -> int:
    return int(Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters/rcvd_pkts").read_text())


def received_bytes(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/rx_bytes").read_text())


def test_every_token_equals_the_engines_own_and_the_kv_went_over_the_devices(tmp_path: Path) -> None:
    found_file = tmp_path / "found.json"
    packets, size = received_packets("rxe1"), received_bytes("eth1")
    command = [
        sys.executable, "-m", "splitwise_sched", "demo", "--engine", "llama_cpp", "--model", MODEL,
        "--json", found_file,
        "--cache-transfer-protocol", "rdma", "--prefill-host", PREFILL, "--decode-host", DECODE,
        "--prefill", "1", "--decode", "1", "--requests", "6", "--concurrency", "2", "--kv-blocks", "32",
        "--ready-timeout-s", TIMEOUT_S, "--instance-lease-s", LEASE_S,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(found_file.read_text())
    assert (found["requests"], found["matched"], found["mismatched"]) == (6, 6, 0)
    assert found["transport"] == "rdma"
    assert {row["lane"] for row in found["per_request"]} == {"rdma"}
    moved = found["kv_bytes_moved"]
    received = received_bytes("eth1") - size, received_packets("rxe1") - packets
    print(f"{moved} bytes of KV: {received[0]} bytes in {received[1]} packets of RDMA")
    # All else between the two addresses of this machine, TCP with it, goes over the loopback interface.
    assert 0 < moved <= received[0]
    assert moved <= received[1] * MTU_BYTES
