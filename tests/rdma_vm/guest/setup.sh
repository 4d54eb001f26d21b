#!/bin/bash
# In the guest's root: a network with RDMA devices on it, then the command; its exit code goes into the job's directory.
job=/run/rdma-vm
exec 2>>"$job/setup.log"
# shellcheck disable=SC1091
. "$job/environment.sh"
ulimit -l unlimited
for device in /sys/class/virtio-ports/*; do
    case "$(cat "$device/name")" in
        stdout) stdout=/dev/${device##*/} ;;
        stderr) stderr=/dev/${device##*/} ;;
    esac
done
while read -r tag directory; do
    mkdir -p "$directory"
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none "$tag" "$directory"
done <"$job/mounts"

# All devices live in one network namespace (rxe needs that), and on one switch. Packets to an address of this very
# machine leave by the interface that a queue pair is bound to, so the other end must take them in from outside, and
# answer ARP for no address but its own.
ip link set lo up
for setting in accept_local=1 rp_filter=0 arp_ignore=1 arp_announce=2; do
    echo "${setting#*=}" >"/proc/sys/net/ipv4/conf/all/${setting%=*}"
    echo "${setting#*=}" >"/proc/sys/net/ipv4/conf/default/${setting%=*}"
done
# A source answers all reads that it has been asked for at once; what overflows here is only asked for again after a second.
echo 20000 >/proc/sys/net/core/netdev_max_backlog
ip link add switch0 type bridge
ip link set switch0 mtu 4500 up
for ((i = 0; i < RDMA_VM_NICS; i++)); do
    ip link add "eth$i" mtu 4500 type veth peer name "port$i" mtu 4500
    ip link set "port$i" master switch0 up
    ip addr add "10.77.0.$((i + 1))/24" dev "eth$i"
    ip link set "eth$i" up
    rdma link add "rxe$i" type rxe netdev "eth$i" || echo "rxe$i cannot be made"
done

echo "rdma-vm: command after $(cut -d' ' -f1 /proc/uptime) s" >/dev/kmsg
touch "$job/started"
setsid /bin/bash "$job/command.sh" </dev/null >"$stdout" 2>"$stderr"
echo $? >"$job/exit-code"
sync
echo b >/proc/sysrq-trigger
sleep 60
