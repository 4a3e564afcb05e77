"""libseccomp, as far as a policy needs it: rules in, a program for the kernel out (seccomp(2), `struct sock_filter`).

Used by the build, by tests and for policies of users; a microVM with the default policy does not load it.
"""

from libc.errno cimport EEXIST
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport strerror

import os
from collections import namedtuple

from crackle.errors import ConfigError

cdef extern from "<seccomp.h>" nogil:
    ctypedef void *scmp_filter_ctx
    enum:
        SCMP_ACT_ALLOW
        SCMP_ACT_LOG
        SCMP_ACT_TRAP
        SCMP_ACT_KILL_THREAD
        SCMP_ACT_KILL_PROCESS
        SCMP_FLTATR_ACT_BADARCH
        SCMP_FLTATR_CTL_OPTIMIZE
        __NR_SCMP_ERROR
        SCMP_ARCH_NATIVE
        SCMP_CMP_NE
        SCMP_CMP_LT
        SCMP_CMP_LE
        SCMP_CMP_EQ
        SCMP_CMP_GE
        SCMP_CMP_GT
        SCMP_CMP_MASKED_EQ
    uint32_t SCMP_ACT_ERRNO(unsigned int number)
    uint32_t SCMP_ACT_TRACE(unsigned int number)
    struct scmp_arg_cmp:
        unsigned int arg
        int op
        uint64_t datum_a
        uint64_t datum_b
    scmp_filter_ctx seccomp_init(uint32_t action)
    void seccomp_release(scmp_filter_ctx)
    int seccomp_attr_set(scmp_filter_ctx, int attribute, uint32_t value)
    int seccomp_rule_add_array(
        scmp_filter_ctx, uint32_t action, int call, unsigned int count, const scmp_arg_cmp *conditions)
    int seccomp_export_bpf(const scmp_filter_ctx, int fd)
    int seccomp_syscall_resolve_name(const char *name)
    char *seccomp_syscall_resolve_num_arch(uint32_t architecture, int number)

cdef enum:
    ARGUMENTS = 6
    # What is looked up is a binary tree, and not a list as long as the policy.
    BINARY_TREE = 2

ALLOW = <uint32_t> SCMP_ACT_ALLOW
LOG = <uint32_t> SCMP_ACT_LOG
TRAP = <uint32_t> SCMP_ACT_TRAP
KILL_THREAD = <uint32_t> SCMP_ACT_KILL_THREAD
KILL_PROCESS = <uint32_t> SCMP_ACT_KILL_PROCESS

COMPARISONS = {
    "ne": SCMP_CMP_NE,
    "lt": SCMP_CMP_LT,
    "le": SCMP_CMP_LE,
    "eq": SCMP_CMP_EQ,
    "ge": SCMP_CMP_GE,
    "gt": SCMP_CMP_GT,
    "masked_eq": SCMP_CMP_MASKED_EQ,
}

Condition = namedtuple("Condition", "argument mask value comparison", defaults=("masked_eq",))
Condition.__doc__ = "What an argument has to be. mask: of the bits that count, where it is compared so (`masked_eq`)."
Rule = namedtuple("Rule", "call conditions action")
Rule.__doc__ = "What becomes of a call, named as in syscalls(2), whose arguments meet all conditions."


def error_action(unsigned int number):
    """The call is not made, and fails with that number."""
    return <uint32_t> SCMP_ACT_ERRNO(number)


def trace_action(unsigned int number):
    """A process that traces this one is told, with that number."""
    return <uint32_t> SCMP_ACT_TRACE(number)


def number_of(str call not None):
    """A call's number on this architecture. ConfigError when it has none."""
    cdef int number = seccomp_syscall_resolve_name(call.encode())
    if number == __NR_SCMP_ERROR or number < 0:
        raise ConfigError(f"{call!r} is no system call of this architecture that libseccomp knows")
    return number


def name_of(int number):
    """What a call is called; None where libseccomp does not know it."""
    cdef char *name = seccomp_syscall_resolve_num_arch(SCMP_ARCH_NATIVE, number)
    if name == NULL:
        return None
    try:
        return (<bytes> name).decode()
    finally:
        free(name)


def compile_filter(uint32_t default, rules):
    """The program of a filter. default: what becomes of a call that no rule fits. ConfigError for a rule that cannot be."""
    cdef scmp_filter_ctx context = seccomp_init(default)
    if context == NULL:
        raise ConfigError(f"{default:#x} is no action of a filter")
    try:
        checked(seccomp_attr_set(context, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS), "set an attribute")
        checked(seccomp_attr_set(context, SCMP_FLTATR_CTL_OPTIMIZE, BINARY_TREE), "set an attribute")
        for rule in rules:
            add_rule(context, default, rule)
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            checked(seccomp_export_bpf(context, fd), "export the program")
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
    finally:
        seccomp_release(context)


cdef int add_rule(scmp_filter_ctx context, uint32_t default, rule) except -1:
    cdef scmp_arg_cmp conditions[ARGUMENTS]
    cdef unsigned int count = 0
    cdef int result
    if rule.action == default:
        return 0  # which says nothing new, and libseccomp refuses it
    for condition in rule.conditions:
        if count == ARGUMENTS or not 0 <= condition.argument < ARGUMENTS:
            raise ConfigError(f"{rule.call}: a call has {ARGUMENTS} arguments, counted from 0")
        conditions[count].arg = condition.argument
        conditions[count].op = COMPARISONS[condition.comparison]
        if condition.comparison == "masked_eq":
            conditions[count].datum_a, conditions[count].datum_b = condition.mask, condition.value
        else:
            conditions[count].datum_a, conditions[count].datum_b = condition.value, 0
        count += 1
    result = seccomp_rule_add_array(context, rule.action, number_of(rule.call), count, conditions)
    if result != 0 and result != -EEXIST:
        raise ConfigError(f"{rule.call}: libseccomp takes no such rule: {strerror(-result).decode()}")
    return 0


cdef int checked(int result, str what) except -1:
    if result < 0:
        raise ConfigError(f"libseccomp cannot {what}: {strerror(-result).decode()}")
    return 0
