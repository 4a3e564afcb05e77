"""virtio: the split virtqueue, what all devices share, the transport, and a room for each kind of device."""
