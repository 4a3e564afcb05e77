"""Token buckets: how many bytes and operations a second a device may have."""
