#!/bin/sh
# First program of Debian's stock kernel in a guest: loads the drivers of the devices that are there, then goes to the root
# file system that the kernel command line names (root= rootfstype= rootflags= ro rw init=), or, without root=, stays here.
# /modules/DRIVER/* are in load order by name; what several drivers share is loaded once and refused afterwards.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

load() {
    for module in /modules/$1/*; do insmod "$module" 2> /dev/null; done
}

load acpi
load virtio_mmio
# The virtio device numbers are those of virtio 1.2 section 5.
for modalias in /sys/bus/virtio/devices/*/modalias; do
    [ -e "$modalias" ] || continue
    read -r name < "$modalias"
    case "$name" in
        virtio:d00000001v*) load virtio_net ;;
        virtio:d00000002v*) load virtio_blk ;;
        virtio:d00000004v*) load virtio-rng ;;
        virtio:d00000005v*) load virtio_balloon ;;
        virtio:d00000013v*) load vmw_vsock_virtio_transport ;;
        virtio:d00000018v*) load virtio_mem ;;
        virtio:d0000001Av*) load virtiofs ;;
        virtio:d0000001Bv*) load virtio_pmem ;;
    esac
done

# What tells the monitor of a panic, where the ACPI tables have it.
grep -qs QEMU0001 /sys/bus/acpi/devices/*/hid && load pvpanic

root= type=ext4 flags= mode=ro init=/sbin/init
read -r line < /proc/cmdline
for word in $line; do
    case "$word" in
        root=*) root=${word#root=} ;;
        rootfstype=*) type=${word#rootfstype=} ;;
        rootflags=*) flags=,${word#rootflags=} ;;
        ro | rw) mode=$word ;;
        init=*) init=${word#init=} ;;
    esac
done
[ -z "$root" ] && exec /sbin/init

case "$root" in
    PARTUUID=*)
        for partition in /sys/class/block/*/uevent; do
            grep -q "^PARTUUID=${root#PARTUUID=}\$" "$partition" 2> /dev/null || continue
            partition=${partition%/uevent}
            root=/dev/${partition##*/}
        done ;;
    UUID=* | LABEL=*) root=$(findfs "$root") ;;
esac
tries=50
while [ ! -b "$root" ] && [ $tries -gt 0 ]; do sleep 0.1; tries=$((tries - 1)); done
if ! mount -t "$type" -o "$mode$flags" "$root" /mnt; then
    echo "crackle: cannot mount the root file system $root; here is a shell"
    exec sh
fi
for each in proc sys dev; do mount --move /$each /mnt/$each; done
exec switch_root /mnt "$init"
