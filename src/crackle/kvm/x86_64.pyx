"""The register state of an x86_64 vCPU (Documentation/virt/kvm/api.rst, 4.11 to 4.43).

Structures that the boot code edits are dicts with the kernel's field names; structures that are only saved and restored
are bytes, exactly as KVM gives them.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from crackle.includes.kvm cimport *
from crackle.kvm.vcpu cimport VcpuBase

from collections import namedtuple

from crackle.errors import KvmError

CpuidEntry = namedtuple("CpuidEntry", "function index flags eax ebx ecx edx")
CPUID_FLAG_SIGNIFICANT_INDEX = KVM_CPUID_FLAG_SIGNIFCANT_INDEX

cdef enum:
    MAX_CPUID = 256         # KVM_MAX_CPUID_ENTRIES
    MAX_MSRS = 512
    FPU_AREA = 128          # fpr[8][16]
    XMM_AREA = 256          # xmm[16][16]


cdef list cpuid_list(kvm_cpuid2 *table):
    cdef uint32_t i
    cdef kvm_cpuid_entry2 *e
    entries = []
    for i in range(table.nent):
        e = &table.entries[i]
        entries.append(CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx))
    return entries


cdef class Vcpu(VcpuBase):
    """A vCPU with x86_64 registers. Set and get them only before `start`, while paused, or after the end."""

    cdef size_t xsave_size

    def __cinit__(self, int fd, int index, size_t run_size, size_t xsave_size=4096):
        self.xsave_size = xsave_size

    # -- edited by the boot code ---------------------------------------------------------------------------------

    def get_regs(self):
        """struct kvm_regs as a dict."""
        cdef kvm_regs regs
        self.ioctl(KVM_GET_REGS, &regs, "get the registers")
        return regs

    def set_regs(self, regs):
        """All 18 fields of struct kvm_regs."""
        cdef kvm_regs native = regs
        self.ioctl(KVM_SET_REGS, &native, "set the registers")

    def get_sregs(self):
        """struct kvm_sregs as a dict of dicts."""
        cdef kvm_sregs sregs
        memset(&sregs, 0, sizeof(sregs))
        self.ioctl(KVM_GET_SREGS, &sregs, "get the special registers")
        return sregs

    def set_sregs(self, sregs):
        """All fields of struct kvm_sregs, as `get_sregs` gives them."""
        cdef kvm_sregs native = sregs
        self.ioctl(KVM_SET_SREGS, &native, "set the special registers")

    def get_fpu(self):
        """struct kvm_fpu: scalars by name, fpr (128 bytes) and xmm (256 bytes)."""
        cdef kvm_fpu fpu
        self.ioctl(KVM_GET_FPU, &fpu, "get the FPU state")
        return {
            "fpr": (<uint8_t *> fpu.fpr)[:FPU_AREA],
            "fcw": fpu.fcw,
            "fsw": fpu.fsw,
            "ftwx": fpu.ftwx,
            "last_opcode": fpu.last_opcode,
            "last_ip": fpu.last_ip,
            "last_dp": fpu.last_dp,
            "xmm": (<uint8_t *> fpu.xmm)[:XMM_AREA],
            "mxcsr": fpu.mxcsr,
        }

    def set_fpu(self, fpu):
        """Any of the fields `get_fpu` gives; those left out are zero."""
        cdef kvm_fpu native
        cdef bytes fpr = fpu.get("fpr", bytes(FPU_AREA)), xmm = fpu.get("xmm", bytes(XMM_AREA))
        if len(fpr) != FPU_AREA or len(xmm) != XMM_AREA:
            raise ValueError(f"fpr is {FPU_AREA} bytes and xmm {XMM_AREA}, not {len(fpr)} and {len(xmm)}")
        memset(&native, 0, sizeof(native))
        memcpy(native.fpr, PyBytes_AS_STRING(fpr), FPU_AREA)
        memcpy(native.xmm, PyBytes_AS_STRING(xmm), XMM_AREA)
        native.fcw, native.fsw = fpu.get("fcw", 0), fpu.get("fsw", 0)
        native.ftwx, native.last_opcode = fpu.get("ftwx", 0), fpu.get("last_opcode", 0)
        native.last_ip, native.last_dp = fpu.get("last_ip", 0), fpu.get("last_dp", 0)
        native.mxcsr = fpu.get("mxcsr", 0)
        self.ioctl(KVM_SET_FPU, &native, "set the FPU state")

    def get_msrs(self, indices):
        """{index: value} for the MSR numbers given; those KVM does not know are left out (api.rst 4.18)."""
        cdef kvm_msrs *table = <kvm_msrs *> calloc(1, sizeof(kvm_msrs) + MAX_MSRS * sizeof(kvm_msr_entry))
        cdef uint32_t i
        cdef int got
        wanted = list(indices)
        result = {}
        if table == NULL:
            raise MemoryError
        try:
            while wanted:
                batch = wanted[:MAX_MSRS]
                table.nmsrs = len(batch)
                for i in range(table.nmsrs):
                    table.entries[i].index = batch[i]
                got = self.ioctl(KVM_GET_MSRS, table, "get the MSRs")
                for i in range(<uint32_t> got):
                    result[table.entries[i].index] = table.entries[i].data
                # KVM stops at the first it does not know: go on after that one.
                wanted = wanted[got + (1 if got < len(batch) else 0):]
        finally:
            free(table)
        return result

    def set_msrs(self, values):
        """Set MSRs from {index: value}. KvmError naming the first that KVM refuses; those before it are set."""
        cdef kvm_msrs *table = <kvm_msrs *> calloc(1, sizeof(kvm_msrs) + len(values) * sizeof(kvm_msr_entry))
        cdef uint32_t i
        cdef int done
        if table == NULL:
            raise MemoryError
        try:
            for i, (index, value) in enumerate(values.items()):
                table.entries[i].index, table.entries[i].data = index, value
            table.nmsrs = len(values)
            done = self.ioctl(KVM_SET_MSRS, table, "set the MSRs")
            if done < len(values):
                entry = table.entries[done]
                raise KvmError(f"KVM refuses MSR {entry.index:#x} = {entry.data:#x} of vCPU {self.index}")
        finally:
            free(table)

    def get_cpuid2(self):
        """The CPUID leaves the guest sees, as CpuidEntry."""
        cdef kvm_cpuid2 *table = <kvm_cpuid2 *> calloc(1, sizeof(kvm_cpuid2) + MAX_CPUID * sizeof(kvm_cpuid_entry2))
        if table == NULL:
            raise MemoryError
        try:
            table.nent = MAX_CPUID
            self.ioctl(KVM_GET_CPUID2, table, "get the CPUID leaves")
            return cpuid_list(table)
        finally:
            free(table)

    def set_cpuid2(self, entries):
        """What CPUID answers: a sequence of CpuidEntry, at most 256."""
        cdef kvm_cpuid2 *table
        cdef uint32_t i
        if len(entries) > MAX_CPUID:
            raise KvmError(f"{len(entries)} CPUID leaves, KVM takes {MAX_CPUID}")
        table = <kvm_cpuid2 *> calloc(1, sizeof(kvm_cpuid2) + MAX_CPUID * sizeof(kvm_cpuid_entry2))
        if table == NULL:
            raise MemoryError
        try:
            for i, (function, index, flags, eax, ebx, ecx, edx) in enumerate(entries):
                table.entries[i].function, table.entries[i].index = function, index
                table.entries[i].flags = flags
                table.entries[i].eax, table.entries[i].ebx = eax, ebx
                table.entries[i].ecx, table.entries[i].edx = ecx, edx
            table.nent = len(entries)
            self.ioctl(KVM_SET_CPUID2, table, "set the CPUID leaves")
        finally:
            free(table)

    # -- saved and restored as they are --------------------------------------------------------------------------

    cdef bytes get_bytes(self, unsigned long request, size_t size, str what):
        data = PyBytes_FromStringAndSize(NULL, size)
        memset(PyBytes_AS_STRING(data), 0, size)
        self.ioctl(request, PyBytes_AS_STRING(data), "get the " + what)
        return data

    cdef set_bytes(self, unsigned long request, size_t size, bytes data, str what):
        if data is None or <size_t> len(data) != size:
            raise ValueError(f"the {what} is {size} bytes, not {len(data or b"")}")
        self.ioctl(request, PyBytes_AS_STRING(data), "set the " + what)

    def get_lapic(self):
        """The local APIC's register page, 1024 bytes."""
        return self.get_bytes(KVM_GET_LAPIC, sizeof(kvm_lapic_state), "LAPIC")

    def set_lapic(self, bytes data):
        self.set_bytes(KVM_SET_LAPIC, sizeof(kvm_lapic_state), data, "LAPIC")

    def get_mp_state(self):
        """KVM_MP_STATE_*: 0 runnable, 1 uninitialised, 3 halted, ..."""
        cdef kvm_mp_state state
        self.ioctl(KVM_GET_MP_STATE, &state, "get the MP state")
        return state.mp_state

    def set_mp_state(self, uint32_t value):
        cdef kvm_mp_state state
        state.mp_state = value
        self.ioctl(KVM_SET_MP_STATE, &state, "set the MP state")

    def get_xsave(self):
        """The XSAVE area: 4096 bytes, or what KVM_CAP_XSAVE2 says."""
        if self.xsave_size > sizeof(kvm_xsave):
            return self.get_bytes(KVM_GET_XSAVE2, self.xsave_size, "XSAVE area")
        return self.get_bytes(KVM_GET_XSAVE, sizeof(kvm_xsave), "XSAVE area")

    def set_xsave(self, bytes data):
        self.set_bytes(KVM_SET_XSAVE, max(self.xsave_size, sizeof(kvm_xsave)), data, "XSAVE area")

    def get_xcrs(self):
        """struct kvm_xcrs."""
        return self.get_bytes(KVM_GET_XCRS, sizeof(kvm_xcrs), "XCRs")

    def set_xcrs(self, bytes data):
        self.set_bytes(KVM_SET_XCRS, sizeof(kvm_xcrs), data, "XCRs")

    def get_debugregs(self):
        """struct kvm_debugregs."""
        return self.get_bytes(KVM_GET_DEBUGREGS, sizeof(kvm_debugregs), "debug registers")

    def set_debugregs(self, bytes data):
        self.set_bytes(KVM_SET_DEBUGREGS, sizeof(kvm_debugregs), data, "debug registers")

    def get_vcpu_events(self):
        """struct kvm_vcpu_events: pending exceptions, interrupts and NMIs."""
        return self.get_bytes(KVM_GET_VCPU_EVENTS, sizeof(kvm_vcpu_events), "pending events")

    def set_vcpu_events(self, bytes data):
        self.set_bytes(KVM_SET_VCPU_EVENTS, sizeof(kvm_vcpu_events), data, "pending events")

    # -- the rest ------------------------------------------------------------------------------------------------

    @property
    def tsc_khz(self):
        """Frequency of the guest's time stamp counter in kHz."""
        return self.ioctl(KVM_GET_TSC_KHZ, NULL, "get the TSC frequency")

    @tsc_khz.setter
    def tsc_khz(self, unsigned long khz):
        self.ioctl(KVM_SET_TSC_KHZ, <void *> khz, "set the TSC frequency")

    def set_guest_debug(self, uint32_t control):
        """KVM_GUESTDBG_* bits, for instance enable and single step; hardware breakpoints stay clear."""
        cdef kvm_guest_debug debug
        memset(&debug, 0, sizeof(debug))
        debug.control = control
        self.ioctl(KVM_SET_GUEST_DEBUG, &debug, "set guest debugging")

    def translate(self, uint64_t address):
        """Guest physical address of the guest virtual `address`, or None when it is not mapped (api.rst 4.15)."""
        cdef kvm_translation t
        memset(&t, 0, sizeof(t))
        t.linear_address = address
        self.ioctl(KVM_TRANSLATE, &t, "translate an address")
        return t.physical_address if t.valid else None

    def nmi(self):
        """Queue a non-maskable interrupt."""
        self.ioctl(KVM_NMI, NULL, "queue an NMI")

    def kvmclock_ctrl(self):
        """Tell the guest that it was paused, so that its watchdogs do not fire (api.rst 4.72). False without kvmclock."""
        try:
            self.ioctl(KVM_KVMCLOCK_CTRL, NULL, "announce the pause")
        except KvmError:
            return False
        return True

    @property
    def description(self):
        """`failure` with the registers a person needs to see where the guest was; None when nothing failed."""
        failure = self.failure
        if failure is None or self.fd < 0:
            return failure
        regs, sregs = self.get_regs(), self.get_sregs()
        general = " ".join(f"{name}={value:#x}" for name, value in regs.items())
        control = " ".join(f"{name}={sregs[name]:#x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer"))
        return f"{failure}; {general} {control} cs={sregs['cs']['selector']:#x} cpl={sregs['ss']['dpl']}"
