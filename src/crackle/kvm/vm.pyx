"""/dev/kvm and the virtual machines made from it (Documentation/virt/kvm/api.rst, 4.1 to 4.77).

What every architecture shares: `KvmBase` owns the /dev/kvm descriptor, `VmBase` the machine's. `crackle.kvm.x86_64` adds
its own. Memory slots name host addresses of a GuestMemory: unmap that only after the Vm is closed.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strerror
from posix.fcntl cimport O_RDWR, open
from posix.unistd cimport close

from crackle.includes.kvm cimport *
from crackle.kvm.vcpu cimport checked_ioctl

from crackle.errors import KvmError


cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC

cdef extern from "<linux/kvm.h>" nogil:
    enum:
        KVM_CAP_IRQCHIP
        KVM_CAP_USER_MEMORY
        KVM_CAP_SET_TSS_ADDR
        KVM_CAP_EXT_CPUID
        KVM_CAP_NR_VCPUS
        KVM_CAP_NR_MEMSLOTS
        KVM_CAP_MP_STATE
        KVM_CAP_USER_NMI
        KVM_CAP_SET_GUEST_DEBUG
        KVM_CAP_IRQ_ROUTING
        KVM_CAP_SET_IDENTITY_MAP_ADDR
        KVM_CAP_ADJUST_CLOCK
        KVM_CAP_VCPU_EVENTS
        KVM_CAP_DEBUGREGS
        KVM_CAP_XSAVE
        KVM_CAP_XCRS
        KVM_CAP_PIT2
        KVM_CAP_PIT_STATE2
        KVM_CAP_IRQFD
        KVM_CAP_IOEVENTFD
        KVM_CAP_TSC_CONTROL
        KVM_CAP_GET_TSC_KHZ
        KVM_CAP_KVMCLOCK_CTRL
        KVM_CAP_TSC_DEADLINE_TIMER
        KVM_CAP_SIGNAL_MSI
        KVM_CAP_READONLY_MEM
        KVM_CAP_CHECK_EXTENSION_VM
        KVM_CAP_MAX_VCPUS
        KVM_CAP_MAX_VCPU_ID
        KVM_CAP_IMMEDIATE_EXIT
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
        KVM_CAP_DIRTY_LOG_RING
        KVM_CAP_XSAVE2
        KVM_CAP_X2APIC_API
        KVM_CAP_SPLIT_IRQCHIP
        KVM_CAP_NESTED_STATE

# Names as in the header, without the prefix: what `check_extension` is asked with.
CAPABILITIES = {
    "IRQCHIP": KVM_CAP_IRQCHIP,
    "USER_MEMORY": KVM_CAP_USER_MEMORY,
    "SET_TSS_ADDR": KVM_CAP_SET_TSS_ADDR,
    "EXT_CPUID": KVM_CAP_EXT_CPUID,
    "NR_VCPUS": KVM_CAP_NR_VCPUS,
    "NR_MEMSLOTS": KVM_CAP_NR_MEMSLOTS,
    "MP_STATE": KVM_CAP_MP_STATE,
    "USER_NMI": KVM_CAP_USER_NMI,
    "SET_GUEST_DEBUG": KVM_CAP_SET_GUEST_DEBUG,
    "IRQ_ROUTING": KVM_CAP_IRQ_ROUTING,
    "SET_IDENTITY_MAP_ADDR": KVM_CAP_SET_IDENTITY_MAP_ADDR,
    "ADJUST_CLOCK": KVM_CAP_ADJUST_CLOCK,
    "VCPU_EVENTS": KVM_CAP_VCPU_EVENTS,
    "DEBUGREGS": KVM_CAP_DEBUGREGS,
    "XSAVE": KVM_CAP_XSAVE,
    "XCRS": KVM_CAP_XCRS,
    "PIT2": KVM_CAP_PIT2,
    "PIT_STATE2": KVM_CAP_PIT_STATE2,
    "IRQFD": KVM_CAP_IRQFD,
    "IOEVENTFD": KVM_CAP_IOEVENTFD,
    "TSC_CONTROL": KVM_CAP_TSC_CONTROL,
    "GET_TSC_KHZ": KVM_CAP_GET_TSC_KHZ,
    "KVMCLOCK_CTRL": KVM_CAP_KVMCLOCK_CTRL,
    "TSC_DEADLINE_TIMER": KVM_CAP_TSC_DEADLINE_TIMER,
    "SIGNAL_MSI": KVM_CAP_SIGNAL_MSI,
    "READONLY_MEM": KVM_CAP_READONLY_MEM,
    "CHECK_EXTENSION_VM": KVM_CAP_CHECK_EXTENSION_VM,
    "MAX_VCPUS": KVM_CAP_MAX_VCPUS,
    "MAX_VCPU_ID": KVM_CAP_MAX_VCPU_ID,
    "IMMEDIATE_EXIT": KVM_CAP_IMMEDIATE_EXIT,
    "MANUAL_DIRTY_LOG_PROTECT2": KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    "DIRTY_LOG_RING": KVM_CAP_DIRTY_LOG_RING,
    "XSAVE2": KVM_CAP_XSAVE2,
    "X2APIC_API": KVM_CAP_X2APIC_API,
    "SPLIT_IRQCHIP": KVM_CAP_SPLIT_IRQCHIP,
    "NESTED_STATE": KVM_CAP_NESTED_STATE,
}

MEM_LOG_DIRTY_PAGES = KVM_MEM_LOG_DIRTY_PAGES
MEM_READONLY = KVM_MEM_READONLY

cdef enum:
    MAX_ROUTES = 4096


cdef class _Descriptor:
    """An owned descriptor that takes ioctls."""

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    cdef long ioctl(self, unsigned long request, void *argument, str what) except -1:
        return checked_ioctl(self.fd, request, argument, what)

    def close(self):
        """Give the descriptor back. Idempotent."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


cdef class KvmBase(_Descriptor):
    """The KVM of this host. KvmError when it cannot be opened or speaks another API version.

    required: names of the capabilities without which no microVM runs, which the architecture gives.
    """

    required = ()

    def __init__(self, path="/dev/kvm"):
        cdef bytes name = path.encode() if isinstance(path, str) else path
        if self.fd >= 0:
            raise KvmError("KVM is open already")
        self.fd = open(name, O_RDWR | O_CLOEXEC)
        if self.fd < 0:
            raise KvmError(f"cannot open {path}: {strerror(errno).decode()}")
        if self.api_version != KVM_API_VERSION:
            raise KvmError(f"{path} speaks KVM API version {self.api_version}, not {KVM_API_VERSION}")

    @property
    def api_version(self):
        """12 since Linux 2.6.22 (api.rst 4.1)."""
        return self.ioctl(KVM_GET_API_VERSION, NULL, "ask KVM for its version")

    @property
    def vcpu_mmap_size(self):
        """Bytes of the kvm_run mapping of each vCPU (api.rst 4.5)."""
        return self.ioctl(KVM_GET_VCPU_MMAP_SIZE, NULL, "ask KVM for the size of kvm_run")

    def check_extension(self, unsigned long capability):
        """0 when KVM lacks the capability, else 1 or a number with a meaning of its own (api.rst 4.4)."""
        return self.ioctl(KVM_CHECK_EXTENSION, <void *> capability, "ask KVM for a capability")

    def missing(self):
        """Names of the required capabilities that this KVM lacks."""
        return [name for name in self.required if not self.check_extension(CAPABILITIES[name])]

    cdef int new_vm(self, VmBase vm) except -1:
        """Make `vm`, which is empty, a new virtual machine (api.rst 4.2)."""
        vm.run_size = self.vcpu_mmap_size
        vm.fd = self.ioctl(KVM_CREATE_VM, NULL, "create a VM")
        return 0


cdef class VmBase(_Descriptor):
    """One virtual machine. Made by `Kvm.create_vm`."""

    def __cinit__(self):
        self.slots = {}

    cdef int new_vcpu(self, unsigned long index) except -1:
        """The descriptor of a new vCPU (api.rst 4.7)."""
        return <int> self.ioctl(KVM_CREATE_VCPU, <void *> index, f"create vCPU {index}")

    def check_extension(self, unsigned long capability):
        """As Kvm.check_extension, for this VM."""
        return self.ioctl(KVM_CHECK_EXTENSION, <void *> capability, "ask the VM for a capability")

    def enable_cap(self, uint32_t capability, uint64_t argument=0):
        """Enable a capability that is off by default (api.rst 4.37)."""
        cdef kvm_enable_cap request
        memset(&request, 0, sizeof(request))
        request.cap, request.args[0] = capability, argument
        self.ioctl(KVM_ENABLE_CAP, &request, f"enable capability {capability}")

    def set_user_memory_region(self, uint32_t slot, uint64_t gpa, uint64_t size, uint64_t hva, uint32_t flags=0):
        """Map `size` bytes of this process's memory at `hva` to the guest physical address `gpa`; size 0 removes the slot
        (api.rst 4.35). Takes milliseconds: KVM waits for a grace period."""
        cdef kvm_userspace_memory_region region
        region.slot, region.flags, region.guest_phys_addr = slot, flags, gpa
        region.memory_size, region.userspace_addr = size, hva
        self.ioctl(KVM_SET_USER_MEMORY_REGION, &region, f"set memory slot {slot} ({size:#x} bytes at {gpa:#x})")
        # KVM writes a bitmap of the slot's size, whatever buffer it is given.
        self.slots[slot] = size

    def get_dirty_log(self, uint32_t slot):
        """Bitmap of the pages of `slot` that vCPUs wrote since the last call (api.rst 4.8)."""
        cdef kvm_dirty_log log
        cdef uint64_t size = self.slots.get(slot, 0)
        if size == 0:
            raise KvmError(f"cannot get the dirty log of memory slot {slot}: there is none")
        bitmap = PyBytes_FromStringAndSize(NULL, (size + (1 << 18) - 1) >> 18 << 3)
        memset(PyBytes_AS_STRING(bitmap), 0, len(bitmap))
        log.slot, log.dirty_bitmap = slot, PyBytes_AS_STRING(bitmap)
        self.ioctl(KVM_GET_DIRTY_LOG, &log, f"get the dirty log of slot {slot}")
        return bitmap

    def irqfd(self, int fd, uint32_t gsi, *, bint assign=True, int resample_fd=-1):
        """Make a write to the eventfd `fd` raise interrupt `gsi`, or stop doing so (api.rst 4.75)."""
        cdef kvm_irqfd request
        memset(&request, 0, sizeof(request))
        request.fd, request.gsi = fd, gsi
        request.flags = 0 if assign else KVM_IRQFD_FLAG_DEASSIGN
        if resample_fd >= 0:
            request.flags |= KVM_IRQFD_FLAG_RESAMPLE
            request.resamplefd = resample_fd
        self.ioctl(KVM_IRQFD, &request, f"attach an eventfd to interrupt {gsi}")

    def ioeventfd(self, int fd, uint64_t address, uint32_t length, *, datamatch=None, bint pio=False, bint assign=True):
        """Make a guest write of `length` bytes at `address` signal the eventfd `fd` without an exit to user space; with
        `datamatch` only when that value is written (api.rst 4.59)."""
        cdef kvm_ioeventfd request
        memset(&request, 0, sizeof(request))
        request.fd, request.addr, request.len = fd, address, length
        if datamatch is not None:
            request.flags |= KVM_IOEVENTFD_FLAG_DATAMATCH
            request.datamatch = datamatch
        if pio:
            request.flags |= KVM_IOEVENTFD_FLAG_PIO
        if not assign:
            request.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN
        self.ioctl(KVM_IOEVENTFD, &request, f"attach an eventfd to address {address:#x}")

    def irq_line(self, uint32_t gsi, bint level):
        """Set the level of an interrupt line (api.rst 4.25)."""
        cdef kvm_irq_level request
        request.irq, request.level = gsi, level
        self.ioctl(KVM_IRQ_LINE, &request, f"set interrupt line {gsi}")

    def signal_msi(self, uint64_t address, uint32_t data):
        """Deliver a message-signalled interrupt (api.rst 4.70)."""
        cdef kvm_msi request
        memset(&request, 0, sizeof(request))
        request.address_lo, request.address_hi, request.data = address & 0xffffffff, address >> 32, data
        self.ioctl(KVM_SIGNAL_MSI, &request, "deliver an MSI")

    def set_gsi_routing(self, routes):
        """Replace the interrupt routing table (api.rst 4.52): ("irqchip", gsi, chip, pin) or ("msi", gsi, address, data)."""
        cdef kvm_irq_routing *table
        cdef kvm_irq_routing_entry *entry
        cdef uint32_t i
        if len(routes) > MAX_ROUTES:
            raise KvmError(f"{len(routes)} interrupt routes, at most {MAX_ROUTES}")
        table = <kvm_irq_routing *> calloc(1, sizeof(kvm_irq_routing) + len(routes) * sizeof(kvm_irq_routing_entry))
        if table == NULL:
            raise MemoryError
        try:
            for i, (kind, gsi, first, second) in enumerate(routes):
                entry = &table.entries[i]
                entry.gsi = gsi
                if kind == "irqchip":
                    entry.type = KVM_IRQ_ROUTING_IRQCHIP
                    entry.u.irqchip.irqchip, entry.u.irqchip.pin = first, second
                elif kind == "msi":
                    entry.type = KVM_IRQ_ROUTING_MSI
                    entry.u.msi.address_lo, entry.u.msi.address_hi = first & 0xffffffff, first >> 32
                    entry.u.msi.data = second
                else:
                    raise ValueError(f"unknown kind of interrupt route {kind!r}")
            table.nr = len(routes)
            self.ioctl(KVM_SET_GSI_ROUTING, table, "set the interrupt routes")
        finally:
            free(table)
