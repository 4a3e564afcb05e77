"""TAP interfaces of the host: frames of a guest as reads and writes of a descriptor (Documentation/networking/tuntap.rst).

Works in the network namespace that the process is in.
"""

from libc.errno cimport EBUSY, EINVAL, EPERM, errno
from libc.string cimport memset
from posix.unistd cimport close

from crackle.includes.net cimport *

import os

from crackle.errors import ConfigError


cdef class Tap:
    """An open TAP that waits for its device. Closes it, unless the device took it over.

    Raises ConfigError, as `open_tap` does.
    """

    cdef int fd
    cdef readonly str name

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    def __init__(self, str name not None):
        self.close()
        self.fd = open_tap(name)
        self.name = tap_name(self.fd)

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def take(self):
        """The descriptor, which is the caller's from now on; opened again when it was taken before."""
        fd = self.fd if self.fd >= 0 else open_tap(self.name)
        self.fd = -1
        return fd

    def close(self):
        """Close what was not taken. Idempotent."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1


cdef bint _exists(str name):
    import socket

    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


cdef str _reason(int error, str name):
    """What is wrong with the TAP that could not be opened, and what to do."""
    if error == EBUSY:
        return "it is in use by another process: end that, or give each microVM a TAP of its own"
    if error == EPERM and _exists(name):
        return "it belongs to another user: make it with `ip tuntap add ... user USER`, or run with CAP_NET_ADMIN"
    if error == EPERM:
        return "there is none of that name and no permission to make one: make it with `ip tuntap add`"
    if error == EINVAL and _exists(name):
        return "the interface of that name is no TAP (or one with other flags): give the name of a TAP"
    return os.strerror(error)


def open_tap(str name):
    """Descriptor of the TAP `name`, not blocking, each frame with a `struct virtio_net_hdr_v1` of 12 bytes before it.

    An empty name lets the kernel choose one, and what follows a NUL does not count, as with Firecracker. The TAP is made, to
    last until the descriptor is closed, when there is none and the process has CAP_NET_ADMIN.
    Raises ConfigError with one sentence.
    """
    cdef ifreq request
    cdef bytes encoded = os.fsencode(name)
    cdef int fd, error = 0, header = sizeof(virtio_net_hdr_v1)
    if len(encoded) >= IFNAMSIZ:
        raise ConfigError(
            f"Open tap device failed: Invalid interface name: {name!r} has {len(encoded)} bytes, "
            f"{IFNAMSIZ - 1} is the most."
        )
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        raise ConfigError(f"Open tap device failed: Couldn't open /dev/net/tun: {problem.strerror}.") from None
    memset(&request, 0, sizeof(request))
    for place in range(len(encoded)):
        request.ifr_name[place] = encoded[place]
    request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    if ioctl(fd, TUNSETIFF, &request) < 0 or ioctl(fd, TUNSETVNETHDRSZ, &header) < 0:
        error = errno
        close(fd)
        # Firecracker's words first: clients look for them.
        raise ConfigError(
            f"Open tap device failed: Error while creating ifreq structure: {os.strerror(error)} (os error {error}). "
            f"Invalid TUN/TAP Backend provided by {name}. Check our documentation on setting up the network devices. "
            f"In short: {_reason(error, name)}."
        )
    return fd


def tap_name(int fd):
    """Name of the TAP behind `fd`; None when it is something else."""
    cdef ifreq request
    memset(&request, 0, sizeof(request))
    if ioctl(fd, TUNGETIFF, &request) < 0:
        return None
    return os.fsdecode(<bytes> request.ifr_name)
