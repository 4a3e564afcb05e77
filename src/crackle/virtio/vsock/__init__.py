"""virtio-vsock (virtio 1.2, section 5.10): the device, its connections, and the Unix sockets behind them."""
