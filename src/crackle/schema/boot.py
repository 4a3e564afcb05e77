"""Where the guest kernel comes from (``/boot-source``)."""

from __future__ import annotations

from crackle.schema._base import Resource


class BootSource(Resource):
    """Host paths of the kernel and, optionally, the initrd.

    ``boot_args`` replaces the default kernel command line.
    """

    kernel_image_path: str
    initrd_path: str | None = None
    boot_args: str | None = None
