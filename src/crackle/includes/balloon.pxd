"""The balloon's structures and numbers from the kernel's header (virtio 1.2, section 5.5)."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <linux/virtio_balloon.h>
    #include <linux/virtio_ids.h>
    """
    enum:
        VIRTIO_ID_BALLOON
        VIRTIO_BALLOON_F_STATS_VQ
        VIRTIO_BALLOON_F_DEFLATE_ON_OOM
        VIRTIO_BALLOON_F_FREE_PAGE_HINT
        VIRTIO_BALLOON_F_REPORTING
        VIRTIO_BALLOON_PFN_SHIFT
        VIRTIO_BALLOON_CMD_ID_STOP
        VIRTIO_BALLOON_CMD_ID_DONE
    struct virtio_balloon_config:
        uint32_t num_pages
        uint32_t actual
        uint32_t free_page_hint_cmd_id
    struct virtio_balloon_stat:
        uint16_t tag
        uint64_t val
