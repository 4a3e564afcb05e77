from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    MAX_CONNECTIONS = 8192

# A connection's life.
cdef enum:
    GREETING = 1    # a host program has connected; its CONNECT line is to come
    DIALLING = 2    # the guest has asked; the host program's backlog is full, and is tried again
    ASKED = 3       # the guest has been, or is to be, asked whether it takes a host program's connection
    OPEN = 4
    DRAINING = 5    # the guest has finished with both directions; the host program has not read everything yet
    FINISHED = 6    # so has the host program: the guest has been, or is to be, told, and answers with a reset
    DEAD = 7        # the guest is to be sent a reset, and that is all

# What the guest is to be sent.
cdef enum:
    SEND_RST = 1
    SEND_RESPONSE = 2
    SEND_REQUEST = 4
    SEND_DATA = 8       # the host program may have written something
    SEND_SHUTDOWN = 16
    SEND_CREDIT = 32

# Deadlines: a list each, in the order in which they fall due.
cdef enum:
    RETRY = 0
    GREET = 1
    SHORT = 2
    LONG = 3
    TIMER_KINDS = 4
    NO_TIMER = 4

cdef struct link:
    connection *previous
    connection *next

cdef struct chain_of:
    connection *first
    connection *last

cdef struct connection:
    uint32_t index          # place in the table, for ever
    uint32_t generation     # changes when the place is given to another connection
    int fd                  # the host program's, -1 when closed
    uint8_t state
    uint8_t todo
    uint8_t guest_shut      # VIRTIO_VSOCK_SHUTDOWN_* that the guest has said ...
    uint8_t told            # ... that it has been told, or is to be
    bint mapped             # found by its ports
    bint request_sent
    bint hung_up            # the host program has closed both directions
    bint at_end             # ... or the one to the guest, and all that it wrote has been read
    bint closing            # the host program has closed something: what it wrote is to be read to the end
    bint deaf               # it takes nothing any more
    bint want_out           # epoll tells when the socket takes more
    bint short_of_credit    # the guest has been asked for credit
    uint32_t host_port
    uint32_t guest_port
    # Flow control (5.10.6.3); all counts wrap at 32 bits.
    uint32_t room           # what the guest may send before it hears that we have passed something on: a power of two
    uint32_t forwarded      # what we have passed on ...
    uint32_t told_forwarded
    uint32_t edge           # ... and up to where the guest may send: this never goes back
    uint32_t guest_room     # and the same of the guest
    uint32_t guest_forwarded
    uint32_t sent
    # What the host program has not taken yet: `held` of `ring_size` bytes from `begin` on.
    uint8_t *ring
    uint32_t ring_size
    uint32_t begin
    uint32_t held
    # Lists that it is in
    bint waiting
    int timer
    uint64_t deadline
    uint64_t gives_up
    link wait
    link due
    connection *same_hash

cdef class Table:
    cdef connection **slots
    cdef connection **buckets
    cdef uint32_t made          # slots that have ever been used
    cdef uint32_t seed
    cdef connection *unused     # by same_hash
    cdef readonly uint32_t count
    cdef chain_of waiting       # for a receive buffer of the guest's
    cdef chain_of timers[TIMER_KINDS]

    cdef bint prepare(self) noexcept nogil
    cdef connection *add(self) noexcept nogil
    cdef void remove(self, connection *c) noexcept nogil
    cdef connection *at(self, uint32_t index, uint32_t generation) noexcept nogil
    cdef uint32_t bucket(self, uint32_t host_port, uint32_t guest_port) noexcept nogil
    cdef connection *find(self, uint32_t host_port, uint32_t guest_port) noexcept nogil
    cdef void map(self, connection *c, uint32_t host_port, uint32_t guest_port) noexcept nogil
    cdef void unmap(self, connection *c) noexcept nogil
    cdef void wait(self, connection *c) noexcept nogil
    cdef void stop_waiting(self, connection *c) noexcept nogil
    cdef void set_timer(self, connection *c, int kind, uint64_t deadline) noexcept nogil
