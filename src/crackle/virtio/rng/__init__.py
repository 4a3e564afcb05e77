"""virtio-rng: the host's random numbers for the guest."""
