from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from crackle.includes.kvm cimport kvm_run
from crackle.kvm.bus cimport Bus, bus_reader
from crackle.runtime.threads cimport Worker

# Why the run loop ended.
cdef enum:
    END_NONE = 0
    END_ASKED = 1           # by stop()
    END_RESET = 2           # the guest asked for a reset
    END_SHUTDOWN = 3        # the guest asked to be switched off
    END_TRIPLE_FAULT = 4    # KVM_EXIT_SHUTDOWN
    END_FAIL_ENTRY = 5
    END_INTERNAL_ERROR = 6
    END_UNHANDLED = 7       # an exit reason nobody handles
    END_IOCTL = 8           # KVM_RUN itself failed
    END_CRASH = 9           # KVM_SYSTEM_EVENT_CRASH
    END_PANIC = 10          # the guest's kernel has panicked

cdef struct exit_counts:
    uint64_t pio_in
    uint64_t pio_out
    uint64_t mmio_read
    uint64_t mmio_write
    uint64_t interrupted
    uint64_t ns_pio         # filled only while profiling
    uint64_t ns_mmio

cdef struct end_record:
    int why
    int error               # errno of KVM_RUN
    uint32_t exit_reason
    uint32_t suberror
    uint32_t ndata
    uint64_t data[16]

# An ioctl on one of KVM's descriptors, without the GIL; KvmError "cannot {what}: ..." when it fails or `fd` is closed (-1).
cdef long checked_ioctl(int fd, unsigned long request, void *argument, str what) except -1

cdef class VcpuBase(Worker):
    cdef readonly int fd
    cdef readonly int index
    cdef kvm_run *run
    cdef size_t run_size
    cdef Bus pio
    cdef Bus mmio
    cdef int exit_fd
    cdef bus_reader pio_reader
    cdef bus_reader mmio_reader
    cdef readonly bint profile
    cdef exit_counts counts
    cdef end_record end
    cdef void loop(self) noexcept nogil
    cdef int handle(self) noexcept nogil
    cdef bint handle_own(self, uint32_t reason, int *action) noexcept nogil
    cdef void run_guest(self) noexcept nogil
    cdef bint obey(self) noexcept nogil
    cdef int ioctl(self, unsigned long request, void *argument, str what) except -1
