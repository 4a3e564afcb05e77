"""virtio: the split virtqueue, the MMIO transport, and one file per device."""
