"""What virtio-block needs beside the common virtio declarations: its commands, and the host's calls on files.

linux/virtio_blk.h (virtio 1.2, section 5.2), linux/falloc.h, linux/fs.h, readv(2), fdatasync(2), fcntl(2).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<linux/virtio_blk.h>" nogil:
    enum:
        VIRTIO_BLK_F_SEG_MAX
        VIRTIO_BLK_F_RO
        VIRTIO_BLK_F_FLUSH
        VIRTIO_BLK_F_DISCARD
        VIRTIO_BLK_F_WRITE_ZEROES
        VIRTIO_BLK_T_IN
        VIRTIO_BLK_T_OUT
        VIRTIO_BLK_T_FLUSH
        VIRTIO_BLK_T_GET_ID
        VIRTIO_BLK_T_DISCARD
        VIRTIO_BLK_T_WRITE_ZEROES
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        VIRTIO_BLK_ID_BYTES
        VIRTIO_BLK_S_OK
        VIRTIO_BLK_S_IOERR
        VIRTIO_BLK_S_UNSUPP

    struct virtio_blk_config:
        uint64_t capacity
        uint32_t size_max
        uint32_t seg_max
        uint32_t max_discard_sectors
        uint32_t max_discard_seg
        uint32_t discard_sector_alignment
        uint32_t max_write_zeroes_sectors
        uint32_t max_write_zeroes_seg
        uint8_t write_zeroes_may_unmap

    struct virtio_blk_outhdr:
        uint32_t type
        uint32_t ioprio
        uint64_t sector

    struct virtio_blk_discard_write_zeroes:
        uint64_t sector
        uint32_t num_sectors
        uint32_t flags

cdef extern from "<unistd.h>" nogil:
    int fdatasync(int fd)

cdef extern from "<fcntl.h>" nogil:
    enum:
        F_OFD_SETLK
        F_RDLCK
        F_WRLCK
        F_UNLCK

    struct flock:
        short l_type

    int fallocate(int fd, int mode, long offset, long length)
    int fcntl(int fd, int command, flock *lock)

cdef extern from "<linux/falloc.h>" nogil:
    enum:
        FALLOC_FL_KEEP_SIZE
        FALLOC_FL_PUNCH_HOLE
        FALLOC_FL_UNSHARE_RANGE
        FALLOC_FL_ZERO_RANGE

cdef extern from "<linux/fs.h>" nogil:
    enum:
        BLKDISCARD
        FICLONE

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, void *argument)
    int clone_file "ioctl" (int fd, unsigned long request, int other)
