"""Snapshots: what is kept of a microVM, the two files that hold it, and how they are written and read.

`state` says what is kept, `statefile` how it becomes bytes, `pair` how the two files appear and are found together,
`save` and `load` do one request each. `vmm` makes and restores the machine; nothing here knows KVM or a device.
"""
