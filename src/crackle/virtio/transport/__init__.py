"""How drivers reach a virtio device: registers, notifications, interrupts (virtio 1.2, section 4)."""
