cdef class _Descriptor:
    cdef readonly int fd
    cdef long ioctl(self, unsigned long request, void *argument, str what) except -1

cdef class KvmBase(_Descriptor):
    cdef int new_vm(self, VmBase vm) except -1

cdef class VmBase(_Descriptor):
    cdef size_t run_size
    cdef dict slots
    cdef int new_vcpu(self, unsigned long index) except -1
