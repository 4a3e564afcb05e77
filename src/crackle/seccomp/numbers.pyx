"""The numbers that a policy has names for, from the headers: requests of ioctl(2), protections, flags, families.

Used by the build and by tests.
"""

cdef extern from * nogil:
    """
    #include <asm/termbits.h>
    #include <fcntl.h>
    #include <linux/fs.h>
    #include <linux/futex.h>
    #include <linux/if_tun.h>
    #include <linux/kvm.h>
    #include <linux/sched.h>
    #include <linux/userfaultfd.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <linux/seccomp.h>
    #include <signal.h>

    /* What pthread_create asks clone(2) for, and fork. */
    #define THREAD_FLAGS (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS | \\
                          CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID)
    #ifndef PROCMAP_QUERY           /* <linux/fs.h>, as of 6.11; its struct procmap_query has 104 bytes */
    #define PROCMAP_QUERY _IOC(_IOC_READ | _IOC_WRITE, 'f', 17, 104)
    #endif
    /* As runtime/threads.pyx has it. */
    #define KICK_SIGNAL (SIGRTMIN + 1)
    #define FORK_FLAGS (CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD)
    """
    cpdef enum:
        # clone(2)
        THREAD_FLAGS
        FORK_FLAGS
        # mmap(2), mprotect(2), madvise(2)
        PROT_EXEC
        # socket(2), setsockopt(2)
        AF_UNIX
        SOL_SOCKET
        SO_SNDBUF
        # openat(2)
        O_ACCMODE
        O_RDONLY
        O_RDWR
        O_CREAT
        O_TRUNC
        # newfstatat(2)
        AT_EMPTY_PATH
        # prctl(2)
        PR_SET_NAME
        PR_SCHED_CORE
        PR_SET_NO_NEW_PRIVS
        # seccomp(2)
        SECCOMP_SET_MODE_FILTER
        # kill(2), tgkill(2)
        KICK_SIGNAL
        SIGABRT
        SIGINT
        SIGKILL
        SIGQUIT
        SIGTERM
        # fcntl(2)
        F_DUPFD_CLOEXEC
        F_GETFL
        F_OFD_SETLK
        F_ADD_SEALS
        # prlimit(2)
        RLIMIT_NOFILE
        # <linux/kvm.h>, in the order of their numbers there
        KVM_GET_API_VERSION
        KVM_CREATE_VM
        KVM_GET_MSR_INDEX_LIST
        KVM_CHECK_EXTENSION
        KVM_GET_VCPU_MMAP_SIZE
        KVM_GET_SUPPORTED_CPUID
        KVM_CREATE_VCPU
        KVM_GET_DIRTY_LOG
        KVM_SET_USER_MEMORY_REGION
        KVM_SET_TSS_ADDR
        KVM_SET_IDENTITY_MAP_ADDR
        KVM_CREATE_IRQCHIP
        KVM_GET_IRQCHIP
        KVM_SET_IRQCHIP
        KVM_SET_GSI_ROUTING
        KVM_IRQFD
        KVM_IRQ_LINE
        KVM_CREATE_PIT2
        KVM_IOEVENTFD
        KVM_SET_CLOCK
        KVM_GET_CLOCK
        KVM_GET_PIT2
        KVM_SET_PIT2
        KVM_RUN
        KVM_GET_REGS
        KVM_SET_REGS
        KVM_GET_SREGS
        KVM_SET_SREGS
        KVM_GET_MSRS
        KVM_SET_MSRS
        KVM_GET_FPU
        KVM_SET_FPU
        KVM_GET_LAPIC
        KVM_SET_LAPIC
        KVM_SET_CPUID2
        KVM_GET_CPUID2
        KVM_GET_MP_STATE
        KVM_SET_MP_STATE
        KVM_GET_VCPU_EVENTS
        KVM_SET_VCPU_EVENTS
        KVM_GET_DEBUGREGS
        KVM_SET_DEBUGREGS
        KVM_SET_TSC_KHZ
        KVM_GET_TSC_KHZ
        KVM_ENABLE_CAP
        KVM_GET_XSAVE
        KVM_SET_XSAVE
        KVM_GET_XSAVE2
        KVM_GET_XCRS
        KVM_SET_XCRS
        KVM_KVMCLOCK_CTRL
        KVM_GET_NESTED_STATE
        KVM_SET_NESTED_STATE
        KVM_GET_SREGS2
        KVM_SET_SREGS2
        KVM_GET_DEVICE_ATTR
        KVM_SET_DEVICE_ATTR
        # <linux/if_tun.h>
        TUNSETIFF
        TUNGETIFF
        TUNSETOFFLOAD
        TUNSETVNETHDRSZ
        # <linux/userfaultfd.h>
        UFFDIO_UNREGISTER
        UFFDIO_WAKE
        UFFDIO_ZEROPAGE
        # ioctl_tty(2), ioctl_fs
        TCGETS
        TCSETS
        TIOCGPGRP
        TIOCOUTQ
        FIONBIO
        BLKDISCARD
        FICLONE
        PROCMAP_QUERY
