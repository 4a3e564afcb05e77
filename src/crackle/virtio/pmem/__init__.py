"""Persistent memory: a file of the host's in the guest's address space."""
