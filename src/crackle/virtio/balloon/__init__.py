"""virtio-balloon: memory that the guest does without, and the host gets back."""
