"""What the emulated host, the guest kernels and the guest images are made with: a cache, Debian packages, archives.

Standard library only: these tools run before the project's virtual environment exists.
"""
