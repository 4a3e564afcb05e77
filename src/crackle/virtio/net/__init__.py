"""virtio-net (virtio 1.2, section 5.1): the device, and the TAP behind it."""
