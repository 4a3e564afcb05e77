"""userfaultfd(2): pages of this process that another one gives, or this one. From linux/userfaultfd.h."""

from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef extern from "<sys/ioctl.h>" nogil:
    enum:
        FIONBIO
    int ioctl(int fd, unsigned long request, ...)

cdef extern from *:
    """
    #include <linux/userfaultfd.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #ifndef USERFAULTFD_IOC_NEW     /* of /dev/userfaultfd, as of 6.1 */
    #define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
    #endif
    #define make_userfault(flags) ((int) syscall(SYS_userfaultfd, flags))
    """
    enum:
        USERFAULTFD_IOC_NEW
    int make_userfault(int flags) nogil

cdef extern from "<linux/userfaultfd.h>" nogil:
    unsigned long UFFDIO_API
    unsigned long UFFDIO_REGISTER
    unsigned long UFFDIO_UNREGISTER
    unsigned long UFFDIO_COPY
    unsigned long UFFDIO_ZEROPAGE
    unsigned long UFFDIO_WAKE
    uint64_t UFFD_API
    uint64_t UFFD_FEATURE_EVENT_REMOVE
    uint64_t UFFDIO_REGISTER_MODE_MISSING
    uint8_t UFFD_EVENT_PAGEFAULT
    uint8_t UFFD_EVENT_REMOVE
    struct uffdio_api:
        uint64_t api
        uint64_t features
    struct uffdio_range:
        uint64_t start
        uint64_t len
    struct uffdio_register:
        uffdio_range range
        uint64_t mode
    struct uffdio_copy:
        uint64_t dst
        uint64_t src
        uint64_t len
        uint64_t mode
        int64_t copy
    struct uffdio_zeropage:
        uffdio_range range
        uint64_t mode
        int64_t zeropage
    struct uffd_fault "struct { __u64 flags; __u64 address; }":
        uint64_t address
    struct uffd_removal "struct { __u64 start; __u64 end; }":
        uint64_t start
        uint64_t end
    union uffd_argument "union uffd_argument":
        uffd_fault pagefault
        uffd_removal remove
    struct uffd_msg:
        uint8_t event
        uffd_argument arg
