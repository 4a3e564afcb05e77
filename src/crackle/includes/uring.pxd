"""liburing, and the part of linux/io_uring.h that virtio-block's Async engine uses."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from crackle.includes.io cimport iovec

cdef extern from "<liburing.h>" nogil:
    enum:
        IORING_SETUP_R_DISABLED
        IORING_SETUP_COOP_TASKRUN
        IORING_FEAT_SUBMIT_STABLE
        IORING_FSYNC_DATASYNC
        IORING_OP_READ
        IORING_OP_WRITE
        IORING_OP_READV
        IORING_OP_WRITEV
        IORING_OP_FSYNC
        IORING_OP_FALLOCATE
        IORING_REGISTER_FILES_UPDATE
        IORING_REGISTER_RESTRICTIONS
        IORING_REGISTER_ENABLE_RINGS
        IORING_RESTRICTION_REGISTER_OP
        IORING_RESTRICTION_SQE_OP
        IORING_RESTRICTION_SQE_FLAGS_REQUIRED
        IOSQE_FIXED_FILE

    struct io_uring_sqe:
        uint8_t opcode
        uint64_t user_data

    struct io_uring_cqe:
        uint64_t user_data
        int res

    struct io_uring_params:
        uint32_t flags
        uint32_t features

    struct io_uring:
        int ring_fd
        unsigned features

    struct io_uring_restriction:
        uint16_t opcode
        uint8_t register_op
        uint8_t sqe_op
        uint8_t sqe_flags

    int io_uring_queue_init_params(unsigned entries, io_uring *ring, io_uring_params *params)
    void io_uring_queue_exit(io_uring *ring)
    int io_uring_register_files(io_uring *ring, const int *files, unsigned count)
    int io_uring_register_files_update(io_uring *ring, unsigned first, const int *files, unsigned count)
    int io_uring_register_eventfd(io_uring *ring, int fd)
    # Its library of version 2.3 lacks io_uring_register_restrictions and io_uring_enable_rings.
    int io_uring_register(unsigned fd, unsigned opcode, const void *argument, unsigned count)
    int io_uring_cq_eventfd_toggle(io_uring *ring, bint enabled)
    unsigned io_uring_cq_ready(const io_uring *ring)
    void io_uring_cq_advance(io_uring *ring, unsigned count)
    io_uring_sqe *io_uring_get_sqe(io_uring *ring)
    int io_uring_submit(io_uring *ring)
    int io_uring_submit_and_wait(io_uring *ring, unsigned count)
    void io_uring_prep_read(io_uring_sqe *sqe, int fd, void *buffer, unsigned size, uint64_t offset)
    void io_uring_prep_write(io_uring_sqe *sqe, int fd, const void *buffer, unsigned size, uint64_t offset)
    void io_uring_prep_readv(io_uring_sqe *sqe, int fd, const iovec *iov, unsigned count, uint64_t offset)
    void io_uring_prep_writev(io_uring_sqe *sqe, int fd, const iovec *iov, unsigned count, uint64_t offset)
    void io_uring_prep_fsync(io_uring_sqe *sqe, int fd, unsigned flags)
    void io_uring_prep_fallocate(io_uring_sqe *sqe, int fd, int mode, uint64_t offset, uint64_t length)
    void io_uring_sqe_set_flags(io_uring_sqe *sqe, unsigned flags)

cdef extern from * nogil:
    """
    /* The completion that is next, or NULL, without a system call. */
    static inline struct io_uring_cqe *next_completion(struct io_uring *ring)
    {
        struct io_uring_cqe *cqe = NULL;
        __io_uring_peek_cqe(ring, &cqe, NULL);
        return cqe;
    }
    """
    io_uring_cqe *next_completion(io_uring *ring)
