"""What of KVM is x86_64: chips, timers, port I/O and the register state of a vCPU (Documentation/virt/kvm/api.rst, 4.3 to
4.77).

Structures that the boot code edits are dicts with the kernel's field names; structures that are only saved and restored
are bytes, exactly as KVM gives them.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from crackle.includes.kvm cimport *
from crackle.kvm.bus cimport BUS_CONTINUE
from crackle.kvm.vcpu cimport VcpuBase
from crackle.kvm.vm cimport KvmBase, VmBase

from collections import namedtuple

from crackle.errors import KvmError

CpuidEntry = namedtuple("CpuidEntry", "function index flags eax ebx ecx edx")
CPUID_FLAG_SIGNIFICANT_INDEX = KVM_CPUID_FLAG_SIGNIFCANT_INDEX

cdef extern from "<linux/kvm.h>" nogil:
    enum:
        KVM_CAP_XSAVE2
        KVM_CAP_NESTED_STATE
        KVM_CAP_SREGS2
        KVM_CLOCK_REALTIME
        KVM_SREGS2_FLAGS_PDPTRS_VALID
        KVM_VCPU_TSC_CTRL
        KVM_VCPU_TSC_OFFSET

cdef extern from *:
    """
    _Static_assert(sizeof(struct kvm_irqchip) == 520, "struct kvm_irqchip");
    """

cdef enum:
    MAX_LIST = 1024
    IRQCHIP_SIZE = 520      # sizeof(struct kvm_irqchip): asserted above
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


cdef class Kvm(KvmBase):
    """The KVM of this host."""

    required = (
        "IRQCHIP", "USER_MEMORY", "SET_TSS_ADDR", "EXT_CPUID", "MP_STATE", "IRQ_ROUTING", "VCPU_EVENTS", "DEBUGREGS", "XSAVE",
        "XCRS", "PIT2", "PIT_STATE2", "IRQFD", "IOEVENTFD", "ADJUST_CLOCK", "IMMEDIATE_EXIT",
    )

    def supported_cpuid(self):
        """The CPUID leaves this KVM can give a guest, as a list of CpuidEntry (api.rst 4.46)."""
        cdef kvm_cpuid2 *table
        table = <kvm_cpuid2 *> calloc(1, sizeof(kvm_cpuid2) + MAX_LIST * sizeof(kvm_cpuid_entry2))
        if table == NULL:
            raise MemoryError
        try:
            table.nent = MAX_LIST
            self.ioctl(KVM_GET_SUPPORTED_CPUID, table, "ask KVM for its CPUID leaves")
            return cpuid_list(table)
        finally:
            free(table)

    def msr_index_list(self):
        """Numbers of the MSRs that make up a vCPU's state (api.rst 4.3)."""
        return self._msr_list(KVM_GET_MSR_INDEX_LIST)

    def msr_feature_index_list(self):
        """Numbers of the MSRs that describe features of the host (api.rst 4.3)."""
        return self._msr_list(KVM_GET_MSR_FEATURE_INDEX_LIST)

    cdef list _msr_list(self, unsigned long request):
        cdef kvm_msr_list *table = <kvm_msr_list *> calloc(1, sizeof(kvm_msr_list) + MAX_LIST * sizeof(uint32_t))
        cdef uint32_t i
        if table == NULL:
            raise MemoryError
        try:
            table.nmsrs = MAX_LIST
            self.ioctl(request, table, "ask KVM for its MSRs")
            return [table.indices[i] for i in range(table.nmsrs)]
        finally:
            free(table)

    def create_vm(self):
        """A new, empty Vm (api.rst 4.2)."""
        cdef Vm vm = Vm.__new__(Vm)
        # The value is the size of the XSAVE area, at least 4096, or 0 on kernels without KVM_GET_XSAVE2.
        vm.xsave_size = self.check_extension(KVM_CAP_XSAVE2)
        # The most that KVM_GET_NESTED_STATE gives, or 0 where guests cannot have guests.
        vm.nested_size = self.check_extension(KVM_CAP_NESTED_STATE)
        vm.has_sregs2 = self.check_extension(KVM_CAP_SREGS2) != 0
        self.new_vm(vm)
        return vm


cdef class Vm(VmBase):
    """One virtual machine with the chips of a PC. Made by `Kvm.create_vm`."""

    cdef size_t xsave_size
    cdef size_t nested_size
    cdef bint has_sregs2

    def create_irqchip(self):
        """The PICs, the IOAPIC and a LAPIC for each vCPU, in the kernel; before the first vCPU (api.rst 4.24)."""
        self.ioctl(KVM_CREATE_IRQCHIP, NULL, "create the interrupt controllers")

    def create_pit2(self):
        """The i8254 timer in the kernel, with a dummy speaker port at 0x61 (api.rst 4.71)."""
        cdef kvm_pit_config config
        memset(&config, 0, sizeof(config))
        config.flags = KVM_PIT_SPEAKER_DUMMY
        self.ioctl(KVM_CREATE_PIT2, &config, "create the timer")

    def set_tss_addr(self, unsigned long address):
        """Where KVM may keep three pages for real mode on Intel hosts, below 4 GiB (api.rst 4.36)."""
        self.ioctl(KVM_SET_TSS_ADDR, <void *> address, "set the TSS address")

    def set_identity_map_addr(self, uint64_t address):
        """Where KVM may keep an identity page table, below 4 GiB; before the first vCPU (api.rst 4.40)."""
        self.ioctl(KVM_SET_IDENTITY_MAP_ADDR, &address, "set the identity map address")

    def create_vcpu(self, unsigned long index):
        """A Vcpu with APIC id `index` (api.rst 4.7)."""
        return Vcpu(
            self.new_vcpu(index), index, self.run_size, self.xsave_size, self.nested_size, self.has_sregs2
        )

    # -- saved and restored as they are --------------------------------------------------------------------------

    cdef bytes _get(self, unsigned long request, bytes data, str what):
        # `data` was just made here and is not shared: the kernel may write into it.
        self.ioctl(request, PyBytes_AS_STRING(data), "get the " + what)
        return data

    def get_irqchip(self, uint32_t chip):
        """struct kvm_irqchip of 0 (PIC 1), 1 (PIC 2) or 2 (IOAPIC) (api.rst 4.26)."""
        return self._get(KVM_GET_IRQCHIP, int(chip).to_bytes(4, "little") + bytes(IRQCHIP_SIZE - 4), "interrupt controllers")

    def set_irqchip(self, bytes state not None):
        if len(state) != IRQCHIP_SIZE:
            raise ValueError(f"struct kvm_irqchip is {IRQCHIP_SIZE} bytes, not {len(state)}")
        self.ioctl(KVM_SET_IRQCHIP, PyBytes_AS_STRING(state), "set the interrupt controllers")

    def get_pit2(self):
        """struct kvm_pit_state2 (api.rst 4.72)."""
        return self._get(KVM_GET_PIT2, bytes(bytearray(sizeof(kvm_pit_state2))), "timer")

    def set_pit2(self, bytes state not None):
        if len(state) != sizeof(kvm_pit_state2):
            raise ValueError(f"struct kvm_pit_state2 is {sizeof(kvm_pit_state2)} bytes, not {len(state)}")
        self.ioctl(KVM_SET_PIT2, PyBytes_AS_STRING(state), "set the timer")

    def get_clock(self):
        """(nanoseconds of the guest's kvmclock, of the host's real time or None where KVM does not say) (api.rst 4.29)."""
        cdef kvm_clock_data clock
        memset(&clock, 0, sizeof(clock))
        self.ioctl(KVM_GET_CLOCK, &clock, "get the clock")
        return clock.clock, clock.realtime if clock.flags & KVM_CLOCK_REALTIME else None

    def set_clock(self, uint64_t nanoseconds):
        """Set the guest's kvmclock (api.rst 4.30)."""
        cdef kvm_clock_data clock
        memset(&clock, 0, sizeof(clock))
        clock.clock = nanoseconds
        self.ioctl(KVM_SET_CLOCK, &clock, "set the clock")


cdef class Vcpu(VcpuBase):
    """A vCPU with x86_64 registers. Set and get them only before `start`, while paused, or after the end."""

    cdef size_t xsave_size
    cdef size_t nested_size
    cdef bint has_sregs2

    def __cinit__(
        self, int fd, int index, size_t run_size, size_t xsave_size=4096, size_t nested_size=0, bint has_sregs2=False
    ):
        self.xsave_size, self.nested_size, self.has_sregs2 = xsave_size, nested_size, has_sregs2

    # -- exits ---------------------------------------------------------------------------------------------------

    cdef bint handle_own(self, uint32_t reason, int *action) noexcept nogil:
        if reason != KVM_EXIT_IO:
            return False
        action[0] = self.handle_pio()
        return True

    cdef int handle_pio(self) noexcept nogil:
        # A string instruction (rep outsb) delivers `count` items of `size` bytes at once.
        cdef kvm_run *run = self.run
        cdef uint32_t count = run.io.count, size = run.io.size
        cdef bint is_write = run.io.direction == KVM_EXIT_IO_OUT
        cdef uint8_t *data = <uint8_t *> run + run.io.data_offset
        cdef int action
        if is_write:
            self.counts.pio_out += 1
        else:
            self.counts.pio_in += 1
        while count > 0:
            action = self.pio.access(&self.pio_reader, run.io.port, data, size, is_write)
            if action != BUS_CONTINUE:
                return action
            data += size
            count -= 1
        return BUS_CONTINUE

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

    def get_pdptrs(self):
        """The four PDPTRs of a guest that pages by PAE; () of another, and where KVM does not tell (api.rst 4.132)."""
        cdef kvm_sregs2 native
        if not self.has_sregs2:
            return ()
        memset(&native, 0, sizeof(native))
        self.ioctl(KVM_GET_SREGS2, &native, "get the special registers")
        return tuple(native.pdptrs) if native.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID else ()

    def set_sregs_with_pdptrs(self, sregs, pdptrs):
        """`set_sregs` without interrupt_bitmap, which is among the pending events, and these four PDPTRs.

        Where KVM does not take them (api.rst 4.133), it reads them from guest memory, at cr3.
        """
        cdef kvm_sregs2 native
        if not self.has_sregs2:
            self.set_sregs(sregs)
            return
        native = {**sregs, "flags": KVM_SREGS2_FLAGS_PDPTRS_VALID, "pdptrs": list(pdptrs)}
        self.ioctl(KVM_SET_SREGS2, &native, "set the special registers")

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

    def get_nested_state(self):
        """struct kvm_nested_state: what the guest's own guests need (api.rst 4.114); empty where it can have none."""
        cdef kvm_nested_state *state
        if self.nested_size < sizeof(kvm_nested_state):
            return b""
        data = PyBytes_FromStringAndSize(NULL, self.nested_size)
        memset(PyBytes_AS_STRING(data), 0, self.nested_size)
        state = <kvm_nested_state *> PyBytes_AS_STRING(data)
        state.size = <uint32_t> self.nested_size
        self.ioctl(KVM_GET_NESTED_STATE, state, "get the nested state")
        return data[:state.size]

    def set_nested_state(self, bytes data not None):
        """As `get_nested_state` gives it; guest memory is there already."""
        if <size_t> len(data) < sizeof(kvm_nested_state):
            raise ValueError(f"struct kvm_nested_state is at least {sizeof(kvm_nested_state)} bytes, not {len(data)}")
        # KVM reads as much as the structure itself says.
        if (<kvm_nested_state *> PyBytes_AS_STRING(data)).size != <size_t> len(data):
            raise ValueError("struct kvm_nested_state is not as long as it says")
        self.ioctl(KVM_SET_NESTED_STATE, PyBytes_AS_STRING(data), "set the nested state")

    # -- the rest ------------------------------------------------------------------------------------------------

    @property
    def tsc_khz(self):
        """Frequency of the guest's time stamp counter in kHz."""
        return self.ioctl(KVM_GET_TSC_KHZ, NULL, "get the TSC frequency")

    @tsc_khz.setter
    def tsc_khz(self, unsigned long khz):
        self.ioctl(KVM_SET_TSC_KHZ, <void *> khz, "set the TSC frequency")

    @property
    def tsc_offset(self):
        """What KVM adds to the host's time stamp counter, scaled, modulo 2**64 (devices/vcpu.rst, 4.1).

        None where KVM does not tell, before Linux 5.16.
        """
        cdef uint64_t offset = 0
        try:
            self._tsc_attribute(KVM_GET_DEVICE_ATTR, &offset)
        except KvmError:
            return None
        return offset

    @tsc_offset.setter
    def tsc_offset(self, uint64_t offset):
        self._tsc_attribute(KVM_SET_DEVICE_ATTR, &offset)

    cdef int _tsc_attribute(self, unsigned long request, uint64_t *offset) except -1:
        cdef kvm_device_attr attribute
        memset(&attribute, 0, sizeof(attribute))
        attribute.group, attribute.attr, attribute.addr = KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, <uint64_t> offset
        return self.ioctl(request, &attribute, "get or set the TSC's offset")

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
