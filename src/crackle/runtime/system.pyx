"""System calls that the os module of Python 3.11 lacks, as a zygote, its children and a jail need them. Each raises OSError.

setns(2), unshare(2), fsopen(2), open_tree(2), move_mount(2), pivot_root(2), umount2(2), capset(2), prctl(2), close_range(2),
sched_setattr(2), ioprio_set(2), inotify(7).
"""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy, memset

import os

cdef extern from * nogil:
    """
    #include <dlfcn.h>
    #include <fcntl.h>
    #include <linux/capability.h>
    #include <sched.h>
    #include <sys/inotify.h>
    #include <sys/mman.h>
    #include <sys/mount.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* <linux/mount.h>, as of 5.2; some C libraries' <sys/mount.h> cannot be had beside it, and others' have these. */
    #ifndef OPEN_TREE_CLONE
    #define OPEN_TREE_CLONE 1
    #endif
    #ifndef OPEN_TREE_CLOEXEC
    #define OPEN_TREE_CLOEXEC O_CLOEXEC
    #endif
    #ifndef MOVE_MOUNT_F_EMPTY_PATH
    #define MOVE_MOUNT_F_EMPTY_PATH 4
    #endif
    #ifndef AT_RECURSIVE
    #define AT_RECURSIVE 0x8000
    #endif
    #define clone_mounts(fd) syscall(SYS_open_tree, fd, "", \
        OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE | AT_EMPTY_PATH)
    #define attach_mounts(tree, folder) syscall(SYS_move_mount, tree, "", folder, "", \
        MOVE_MOUNT_F_EMPTY_PATH | 0x40 /* MOVE_MOUNT_T_EMPTY_PATH */)
    /* FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE. */
    #define open_filesystem(kind) syscall(SYS_fsopen, kind, 1 /* FSOPEN_CLOEXEC */)
    #define set_option(context, name, value) syscall(SYS_fsconfig, context, 1, name, value, 0)
    #define create_filesystem(context) syscall(SYS_fsconfig, context, 6, NULL, NULL, 0)
    #define mount_filesystem(context) syscall(SYS_fsmount, context, 1 /* FSMOUNT_CLOEXEC */, 0)
    #define swap_root() syscall(SYS_pivot_root, ".", ".")
    #define detach_root() umount2(".", MNT_DETACH)
    #define follow_mounts() mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL)

    static long keep_capabilities(uint64_t kept) {
        struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];
        if (syscall(SYS_capget, &header, sets))
            return -1;
        for (int i = 0; i < _LINUX_CAPABILITY_U32S_3; i++) {
            sets[i].permitted &= (uint32_t) (kept >> 32 * i);
            sets[i].effective = sets[i].permitted;
            sets[i].inheritable = 0;
        }
        return syscall(SYS_capset, &header, sets);
    }

    /* struct sched_attr, handed on as it is; its header and the C library's do not go together. */
    #define SCHEDULING_SIZE 56
    #define get_scheduling(pid, attributes) syscall(SYS_sched_getattr, pid, attributes, SCHEDULING_SIZE, 0)
    #define set_scheduling(attributes) syscall(SYS_sched_setattr, 0, attributes, 0)
    #ifndef MADV_POPULATE_WRITE     /* <linux/mman.h>, as of 5.14 */
    #define MADV_POPULATE_WRITE 23
    #endif

    /* <linux/ioprio.h>, IOPRIO_WHO_PROCESS */
    #define io_priority(pid) syscall(SYS_ioprio_get, 1, pid)
    #define close_range(first, last) syscall(SYS_close_range, first, last, 0)
    #define set_io_priority(priority) syscall(SYS_ioprio_set, 1, 0, priority)
    """
    enum:
        C_NEWNET "CLONE_NEWNET"
        C_NEWNS "CLONE_NEWNS"
        C_NEWPID "CLONE_NEWPID"
        C_SETGID "CAP_SETGID"
        C_SETUID "CAP_SETUID"
        PR_CAPBSET_DROP
        PR_CAPBSET_READ
        PR_CAP_AMBIENT
        PR_CAP_AMBIENT_CLEAR_ALL
        PR_SCHED_CORE
        PR_SCHED_CORE_CREATE
        PR_SCHED_CORE_SCOPE_THREAD_GROUP
        PR_SET_DUMPABLE
        PR_SET_NAME
        PR_SET_NO_NEW_PRIVS
        RTLD_NOW
        MADV_POPULATE_WRITE
        IN_CLOEXEC
        IN_NONBLOCK
        IN_CLOSE_WRITE
        IN_CREATE
        IN_DELETE
        IN_MOVED_FROM
        IN_MOVED_TO
        SCHEDULING_SIZE
    int c_setns "setns"(int fd, int type)
    int c_unshare "unshare"(int kinds)
    void *dlopen(const char *name, int flags)
    long clone_mounts(int fd)
    long attach_mounts(int tree, int folder)
    long open_filesystem(const char *kind)
    long set_option(int context, const char *name, const char *value)
    long create_filesystem(int context)
    long mount_filesystem(int context)
    long swap_root()
    long detach_root()
    long follow_mounts()
    long keep_capabilities(uint64_t kept)
    int c_fork "fork"()
    int madvise(void *address, size_t size, int advice)
    int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
    long get_scheduling(int pid, char *attributes)
    long set_scheduling(char *attributes)
    long io_priority(int pid)
    long close_range(unsigned int first, unsigned int last)
    long set_io_priority(int priority)
    int inotify_init1(int flags)
    int inotify_add_watch(int fd, const char *path, uint32_t mask)


cdef extern from "Python.h":
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Child()
    void PyOS_AfterFork_Parent()


cdef long checked(long result) except? -1:
    if result < 0:
        raise OSError(errno, os.strerror(errno))
    return result


# Kinds of namespaces (namespaces(7)).
CLONE_NEWNET = C_NEWNET
CLONE_NEWNS = C_NEWNS
CLONE_NEWPID = C_NEWPID

# Capabilities (capabilities(7)).
CAP_SETGID = C_SETGID
CAP_SETUID = C_SETUID


def join_namespace(int fd, int kind=0):
    """Move this thread, the only one of its process, into the namespace that `fd` is open on, if it is of that kind."""
    checked(c_setns(fd, kind))


def unshare(int kinds):
    """Have new namespaces of these kinds (CLONE_NEW...); a new one of processes is that of the children."""
    checked(c_unshare(kinds))


def follow_host_mounts():
    """Have what the host mounts and unmounts appear in this mount namespace, and nothing of this one there."""
    checked(follow_mounts())


def clone_tree(int folder):
    """A descriptor of a copy of what is mounted at `folder` and below it, which is attached nowhere yet."""
    return <int> checked(clone_mounts(folder))


def attach_tree(int tree, int folder):
    """Mount what `clone_tree` has made on top of `folder`."""
    checked(attach_mounts(tree, folder))


def make_tmpfs(options):
    """A descriptor of an empty file system in memory, mounted nowhere yet. options: names and values (tmpfs(5))."""
    cdef int context = <int> checked(open_filesystem(b"tmpfs"))
    cdef bytes name, value
    try:
        for name, value in options.items():
            checked(set_option(context, name, value))
        checked(create_filesystem(context))
        return <int> checked(mount_filesystem(context))
    finally:
        os.close(context)


def pivot_root():
    """Make the working directory, which something is mounted on, the root; the old one is mounted on top of it then."""
    checked(swap_root())


def detach_old_root():
    """After `pivot_root`: let go of the old root and all that is mounted there."""
    checked(detach_root())


def empty_bounding_set():
    """For good: nothing that is executed has a capability (capabilities(7))."""
    cdef int capability = 0
    while prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        checked(prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
        capability += 1


def drop_capabilities(kept=()):
    """Have none, effective, permitted, inheritable or ambient, but those that are `kept`, as far as there are; CAP_..."""
    cdef uint64_t left = 0
    for capability in kept:
        left |= <uint64_t> 1 << <int> capability
    checked(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    checked(keep_capabilities(left))


def forbid_dumps():
    """Leave no core dumps, and let no process without privileges trace this one or read its memory."""
    checked(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def load_unwinder():
    """Have what the C library opens by name when a thread ends early, and aborts without (pthread_exit(3))."""
    dlopen(b"libgcc_s.so.1", RTLD_NOW)


def close_from(unsigned int first, kept=()):
    """Close every descriptor from that number on, but those that are `kept`."""
    cdef unsigned int fd
    for fd in sorted(kept):
        if fd > first:
            checked(close_range(first, fd - 1))
        first = max(first, fd + 1)
    checked(close_range(first, ~<unsigned int> 0))


def fork():
    """As os.fork(), of a process whose other threads are known to hold nothing that the child needs."""
    cdef int pid, error
    PyOS_BeforeFork()
    pid = c_fork()
    error = errno
    if pid == 0:
        PyOS_AfterFork_Child()
    else:
        PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(error, os.strerror(error))
    return pid


def separate_cores():
    """Have no core in common with other processes' threads at any moment; those that this one forks have (prctl(2))."""
    checked(prctl(PR_SCHED_CORE, PR_SCHED_CORE_CREATE, 0, PR_SCHED_CORE_SCOPE_THREAD_GROUP, 0))


def set_no_new_privs():
    """For good: nothing that is executed gets more privileges."""
    checked(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def copy_scheduling(int pid):
    """Have the policy, niceness and I/O priority of another process."""
    cdef char theirs[SCHEDULING_SIZE]
    cdef char own[SCHEDULING_SIZE]
    cdef long priority
    checked(get_scheduling(pid, theirs))
    checked(get_scheduling(0, own))
    if memcmp(theirs, own, SCHEDULING_SIZE):
        checked(set_scheduling(theirs))
    priority = checked(io_priority(pid))
    if priority != checked(io_priority(0)):
        checked(set_io_priority(<int> priority))


_title = None


def title_place(bint environment=True):
    """Where the kernel finds this process's arguments and, right behind, its environment: address and size.

    Without `environment` that of the arguments. Who has asked once, or its parent, may ask where there is no /proc.
    """
    global _title
    if _title is None:
        with open("/proc/self/stat", "rb", buffering=0) as file:
            # arg_start, arg_end and env_end (proc(5), stat 48, 49 and 51; the list begins with the third).
            fields = file.readall().rpartition(b")")[2].split()
        _title = int(fields[45]), int(fields[46]), int(fields[48])
    return _title[0], _title[2 if environment else 1] - _title[0]


def set_title(size_t place, size_t size, bytes line not None, bytes name not None):
    """Be listed with the command `line` and the thread name `name`.

    place, size: as `title_place` has them. The last byte is no NUL then, by which proc(5) knows that the line is one string.
    """
    if size < 2:
        return
    cdef char *area = <char *> place
    cdef size_t length = min(<size_t> len(line), size - 1)
    memset(area, 0, size)
    memcpy(area, <char *> line, length)
    prctl(PR_SET_NAME, <unsigned long> <char *> name, 0, 0, 0)


def watch_directories(directories):
    """A descriptor (inotify(7), not blocking) that is readable when a file in one of them has changed, come or gone."""
    cdef int fd = <int> checked(inotify_init1(IN_CLOEXEC | IN_NONBLOCK))
    cdef bytes path
    try:
        for directory in directories:
            path = os.fsencode(directory)
            checked(inotify_add_watch(
                fd, path, IN_CLOSE_WRITE | IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO
            ))
    except BaseException:
        os.close(fd)
        raise
    return fd


def own_pages(bytes ranges not None):
    """Have pages of one's own in ranges that will be written to anyway: pairs of numbers, address and size in bytes.

    A page that a fork left shared costs a fault when it is written to; here the kernel copies them one after the other.
    What cannot be done, on kernels before 5.14 all of it, is left to the faults.
    """
    cdef const uintptr_t *pair = <const uintptr_t *> <const char *> ranges
    cdef size_t count = <size_t> len(ranges) // (2 * sizeof(uintptr_t))
    cdef size_t i
    for i in range(count):
        madvise(<void *> pair[2 * i], pair[2 * i + 1], MADV_POPULATE_WRITE)
