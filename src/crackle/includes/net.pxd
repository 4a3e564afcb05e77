"""virtio-net's structures (virtio 1.2, section 5.1) and the TAP interface, from the kernel's headers."""

from libc.stdint cimport uint8_t, uint16_t

cdef extern from * nogil:
    """
    #include <linux/virtio_ids.h>
    #include <linux/virtio_net.h>
    #include <linux/if_tun.h>
    #include <net/if.h>
    #include <sys/ioctl.h>

    /* Newer than the headers of some distributions (Linux 6.2; virtio 1.2, section 5.1.3). */
    #ifndef TUN_F_USO4
    #define TUN_F_USO4 0x20
    #define TUN_F_USO6 0x40
    #endif
    #ifndef VIRTIO_NET_F_HOST_USO
    #define VIRTIO_NET_F_GUEST_USO4 54
    #define VIRTIO_NET_F_GUEST_USO6 55
    #define VIRTIO_NET_F_HOST_USO 56
    #endif
    """
    enum:
        IFNAMSIZ
        IFF_TAP
        IFF_NO_PI
        IFF_VNET_HDR
        TUNSETIFF
        TUNGETIFF
        TUNSETVNETHDRSZ
        TUNSETOFFLOAD
        TUN_F_CSUM
        TUN_F_TSO4
        TUN_F_TSO6
        TUN_F_UFO
        TUN_F_USO4
        TUN_F_USO6
        SIOCGIFMTU
        VIRTIO_ID_NET
        VIRTIO_NET_F_CSUM
        VIRTIO_NET_F_GUEST_CSUM
        VIRTIO_NET_F_MTU
        VIRTIO_NET_F_MAC
        VIRTIO_NET_F_GUEST_TSO4
        VIRTIO_NET_F_GUEST_TSO6
        VIRTIO_NET_F_GUEST_UFO
        VIRTIO_NET_F_HOST_TSO4
        VIRTIO_NET_F_HOST_TSO6
        VIRTIO_NET_F_HOST_UFO
        VIRTIO_NET_F_MRG_RXBUF
        VIRTIO_NET_F_GUEST_USO4
        VIRTIO_NET_F_GUEST_USO6
        VIRTIO_NET_F_HOST_USO

    struct ifreq:
        char ifr_name[16]
        short ifr_flags
        int ifr_mtu

    struct virtio_net_hdr_v1:
        uint8_t flags
        uint8_t gso_type
        uint16_t hdr_len
        uint16_t gso_size
        uint16_t csum_start
        uint16_t csum_offset
        uint16_t num_buffers

    # The part that every driver may read, up to `mtu`.
    struct virtio_net_config:
        uint8_t mac[6]
        uint16_t status
        uint16_t max_virtqueue_pairs
        uint16_t mtu

    int ioctl(int fd, unsigned long request, ...)
