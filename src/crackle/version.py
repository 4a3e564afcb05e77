"""The version of this package, once; ``pyproject.toml`` has the same. And that of the API it speaks."""

VERSION = "0.1.0"

# Whose API is spoken: clients of Firecracker compare it with the least that they need.
FIRECRACKER_VERSION = "1.16.0"
