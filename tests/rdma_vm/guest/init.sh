#!/bin/busybox sh
# First process of the guest: loads modules, makes the host's root its own (under a layer that is thrown away), goes on
# with guest/setup.sh there.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
say() { echo "rdma-vm: $*" >/dev/kmsg; }
fail() { say "$*"; $B sleep 0.5; $B poweroff -f; }

while read -r module; do
    $B insmod "/mods/$module" || say "module $module does not load"
done </mods/order

share() { $B mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" || fail "no share $1"; }
share host /host cache=loose,ro
share packages /packages cache=loose,ro
$B mount -t tmpfs -o mode=755 tmpfs /rw
$B mkdir -p /rw/upper /rw/work
$B mount -t overlay -o lowerdir=/packages:/host,upperdir=/rw/upper,workdir=/rw/work overlay /newroot \
    || fail "no overlay"
for name in proc sys dev; do $B mount -o move "/$name" "/newroot/$name"; done
cd /newroot || fail "no new root"
$B mount -t tmpfs tmpfs /newroot/run
$B mkdir -p /newroot/run/rdma-vm /newroot/dev/pts /newroot/dev/shm
$B mount -t devpts devpts /newroot/dev/pts
$B mount -t tmpfs tmpfs /newroot/dev/shm
share job /newroot/run/rdma-vm cache=none
exec $B switch_root /newroot /bin/bash /run/rdma-vm/setup.sh
