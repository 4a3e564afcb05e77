"""virtio-block (virtio 1.2, section 5.2): the device, its engines, and the file or block device behind it."""
