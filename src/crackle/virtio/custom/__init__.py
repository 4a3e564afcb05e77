"""Virtio devices written in Python (docs/devices.md)."""
