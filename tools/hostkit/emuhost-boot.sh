#!/busybox sh
# First program of the emulated host, in its initial RAM file system: loads the modules, lays a throw-away layer over the
# machine's own root file system, and moves there.
# /modules/* are in load order by name; /job/shares lists "TAG PATH" lines; both come from tools/hostkit/emuhost.py.
b=/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do $b insmod "$module" || echo "emuhost: cannot load $module"; done

# Looking up a name in 9p costs a round trip; the machine's files are taken not to change meanwhile, so cache everything.
nine=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o ro,cache=loose,$nine root /lower || exec $b poweroff -f
$b mount -t tmpfs -o size=80%,mode=755 layer /layer
$b mkdir /layer/upper /layer/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /root || exec $b poweroff -f

cd /root
$b mkdir -p proc sys dev run lib/modules
for each in proc sys dev; do $b mount --move /$each $each; done
$b mount -t tmpfs -o mode=755 run run
$b mkdir -p run/emuhost run/lock
$b cp /busybox /init2 /job/run /job/token run/emuhost/
while read -r tag path; do
    $b mkdir -p "/root$path"
    $b mount -t 9p -o cache=mmap,$nine "$tag" "/root$path" || exec $b poweroff -f
    echo "$path" >> run/emuhost/shares
done < /job/shares
$b mount --bind "/root$($b cat /job/modules)" lib/modules
exec $b switch_root /root /run/emuhost/busybox sh /run/emuhost/init2
