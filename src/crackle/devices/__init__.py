"""The few devices that are not virtio."""
