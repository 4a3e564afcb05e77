"""What the emulated host and the guests are made with: a cache, Debian packages, kernels, archives.

Standard library only: these tools run before the project's virtual environment exists.
"""
