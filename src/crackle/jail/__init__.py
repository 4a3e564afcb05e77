"""The jail: what a monitor's process can still reach, should its guest take it over.

A process that has everything imported enters it and becomes the monitor, without executing or copying anything: `entry`
has the order of things, `folder` what the new root holds, `namespaces`, `cgroups` and `privileges` the kernel's half.
Firecracker's docs/jailer.md is the specification; docs/jailer.md says what differs.
"""
