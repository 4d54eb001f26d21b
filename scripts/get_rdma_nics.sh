#!/usr/bin/env bash
# Prints KVCACHE_RDMA_NICS=a,b for GPU pools (one NIC a GPU, the nearest) or for CPU pools (all that are usable).
# Usage: scripts/get_rdma_nics.sh gpu|cpu
set -euo pipefail
case "${1-}" in
    gpu | cpu) ;;
    *) echo "usage: $0 gpu|cpu" >&2; exit 2 ;;
esac
exec "${SPLITWISE_SCHED:-splitwise-sched}" rdma-nics "$1" --env
