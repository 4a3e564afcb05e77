# Second part of the emulated host's first program, in the final root: makes it look like an ordinary machine, runs the
# command, and reports. Ports of the virtio console: 1 stdin, 2 stdout, 3 stderr, 4 control.
cd /run/emuhost
b=/run/emuhost/busybox
for name in modprobe sh; do $b ln -s busybox $name; done
echo /run/emuhost/modprobe > /proc/sys/kernel/modprobe

$b mkdir -p /dev/pts /dev/shm /dev/mqueue /dev/hugepages /dev/net
$b mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
$b mount -t tmpfs -o mode=1777 shm /dev/shm
$b mount -t mqueue mqueue /dev/mqueue
$b mount -t hugetlbfs hugetlbfs /dev/hugepages
$b ln -s /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do $b ln -s /proc/self/fd/${n%:*} /dev/${n#*:}; done
# Opening one of these loads its module.
$b mknod /dev/vhost-net c 10 238
$b mknod /dev/vhost-vsock c 10 241
$b mknod /dev/loop-control c 10 237
$b mknod /dev/fuse c 10 229
$b chmod 666 /dev/kvm /dev/net/tun /dev/fuse

$b mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $($b cat /sys/fs/cgroup/cgroup.controllers); do
    echo +$controller > /sys/fs/cgroup/cgroup.subtree_control
done
# What comes in there only wakes this machine.
$b stty -echo < /dev/console
$b ip link set lo up
$b hostname emuhost

# The command gets pipes, as under a shell: a port can be opened only once, which would break /dev/stdout.
$b mkfifo in out err
# The ports appear some time after the driver does.
tries=100
until [ -c /dev/vport*p4 ]; do
    [ $tries -gt 0 ] || $b poweroff -f
    tries=$((tries - 1))
    $b sleep 0.1
done
port=$(echo /dev/vport*p4)
port=${port%4}
exec 6>${port}2 7>${port}3 8>${port}4
# The token, on both outputs, says that this machine is up; later it tells the end of each stream from anything that the
# command may have printed.
. /run/emuhost/token
printf %s "$token" >&6
printf %s "$token" >&7
{ $b cat out >&6; } & relays=$!
{ $b cat err >&7; } & relays="$relays $!"
$b cat ${port}1 > in &
# In a shell that has no children yet: the end of one would interrupt it while it waits for the pipes' other ends.
( $b sh run < in > out 2> err 6>&- 7>&- 8>&- )
status=$?

# End what the command left behind, so that the pipes close, but not the relays, which may still have output to pass on.
keep=" 1 $relays "
for pid in $relays; do keep="$keep$($b cat /proc/$pid/task/$pid/children 2> /dev/null)"; done
for path in /proc/[0-9]*; do
    pid=${path#/proc/}
    case "$keep" in *" $pid "*) ;; *) [ -e $path/exe ] && kill -9 $pid ;; esac
done 2> /dev/null
wait $relays
cd /
if [ -e /run/emuhost/shares ]; then
    $b sync
    while read -r path; do $b umount "$path" || $b umount -l "$path"; done < /run/emuhost/shares
fi 2> /dev/null
printf %s "$token" >&6
printf %s "$token" >&7
printf '%s\n' "$status" >&8
# The other side now ends this machine.
while :; do $b sleep 1000; done
