from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t

from crackle.includes.io cimport iovec
from crackle.includes.virtio cimport vring_desc, vring_used_elem
from crackle.memory.guest cimport MAX_REGIONS, GuestMemory

cdef enum:
    MAX_QUEUE_SIZE = 256
    # Entries of a chain's iov. A buffer that lies in two regions of guest memory has two; of the buffers of a chain that
    # names nothing twice, no more are cut than there are regions.
    CHAIN_IOV = MAX_QUEUE_SIZE + MAX_REGIONS

# Where fields are in the available and the used ring, in units of 16 bits (2.7.6 and 2.7.8).
cdef enum:
    RING_FLAGS = 0
    RING_IDX = 1
    RING_ENTRIES = 2

# What pop() found.
cdef enum:
    QUEUE_EMPTY = 0
    QUEUE_CHAIN = 1
    QUEUE_BROKEN = -1

# A descriptor chain, copied out of guest memory and checked: the buffers that the device reads, then those it writes.
cdef struct chain:
    uint16_t head
    int readable            # number of entries of iov that the device reads ...
    int writable            # ... and, after them, of those it writes
    uint64_t readable_bytes
    uint64_t writable_bytes
    iovec iov[CHAIN_IOV]
    uint64_t gpa[CHAIN_IOV]

cdef class Virtqueue:
    cdef readonly uint16_t max_size
    cdef readonly uint16_t size
    cdef readonly bint ready
    cdef readonly uint64_t desc_gpa
    cdef readonly uint64_t avail_gpa
    cdef readonly uint64_t used_gpa
    cdef GuestMemory memory
    cdef bint event_idx
    cdef bint indirect
    cdef bint names_only        # of what is to be written the device wants to know where it is, and not to write there
    cdef bint hushed            # the driver has been told, by the flag, that no notification is wanted
    cdef uint16_t next_avail
    cdef uint16_t next_used
    cdef uint16_t published     # next_used as the driver sees it
    cdef uint16_t signalled     # next_used when it was last decided whether to interrupt the driver
    cdef bint signalled_valid
    cdef const char *fault      # why the queue broke
    cdef vring_desc *desc
    # Heads of chains that the device has taken and not returned, in order, where it may keep them (`pop_to_keep`): it has the
    # first `in_hand` of them, and is to get the others again, as it was restored since.
    cdef uint16_t kept[MAX_QUEUE_SIZE]
    cdef int kept_count, in_hand
    cdef uint16_t *avail        # flags, idx, ring[size], used_event
    cdef uint16_t *used         # flags, idx, ring[size] of 8 bytes, avail_event
    cdef uint16_t cached_avail  # avail.idx when last looked at

    cdef void reset(self) noexcept nogil
    cdef bint enable(self) noexcept nogil
    cdef bint let_go(self, uint64_t gpa, uint64_t size) noexcept nogil
    cdef int follow(self, uint32_t head, chain *c) noexcept nogil
    cdef int pop(self, chain *c) noexcept nogil
    cdef int walk(self, uint32_t head, chain *c) noexcept nogil
    cdef int pop_to_keep(self, chain *c) noexcept nogil
    cdef void push_kept(self, uint16_t head, uint32_t length) noexcept nogil
    cdef int add_buffer(self, chain *c, vring_desc *d) noexcept nogil
    cdef int broken(self, const char *why) noexcept nogil
    cdef void put_back(self, uint16_t count) noexcept nogil
    cdef void push(self, uint16_t head, uint32_t length) noexcept nogil
    cdef void publish(self) noexcept nogil
    cdef bint show(self, bint last) noexcept nogil
    cdef bint wants_interrupt(self) noexcept nogil
    cdef bint has_more(self) noexcept nogil
    cdef bint rearm(self) noexcept nogil

# Copies up to `size` bytes between `data` and the first `count` buffers from `offset` on; returns how many.
cdef size_t copy_buffers(
    const iovec *iov, int count, size_t offset, void *data, size_t size, bint to_guest
) noexcept nogil
