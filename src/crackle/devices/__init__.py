"""The few devices that are not virtio, and the I/O thread that all devices share."""
