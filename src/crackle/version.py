"""The version of this package, once; ``pyproject.toml`` has the same."""

VERSION = "0.1.0"
