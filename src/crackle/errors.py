"""The errors Crackle raises. A leaf module: every room may use it.

The message of each says what was wrong, with the value, and what to do; the API returns the same sentence as
``fault_message``.
"""

from __future__ import annotations


class CrackleError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(CrackleError):
    """A configuration that cannot be honoured: a bad value, a missing file, a resource that is taken."""


class TooLargeError(ConfigError):
    """More than there is room for, which the API answers with status 413."""


class StateError(CrackleError):
    """A command that is not allowed in the microVM's present state."""


class KvmError(CrackleError):
    """A KVM system call failed, or the host's KVM lacks something that is needed."""


class CapacityError(CrackleError):
    """Nothing is ready of what was asked for, and there is nothing to wait for or no time."""


class GuestError(CrackleError):
    """The guest did something that ended it: a triple fault, an exit KVM could not handle."""


class MemoryAccessError(CrackleError):
    """A guest physical address range that is not wholly inside guest memory."""


def reason_of(error: BaseException) -> str | None:
    """What the host or a value can cause anywhere, in words; None for an error that is a mistake of ours.

    No descriptors, threads or memory left; a path that cannot be one; a module that cannot be read.
    """
    if isinstance(error, OSError):
        return os_reason(error) + (f": {error.filename}" if error.filename is not None else "")
    if isinstance(error, (ValueError, OverflowError, MemoryError, RuntimeError, ImportError)):
        return str(error) or "out of memory"
    return None


def os_reason(error: OSError | ValueError) -> str:
    """What the operating system said, with its number: ``No such file or directory (os error 2)``.

    Or why it was not even asked: a ValueError is about a path that cannot be one.
    """
    if isinstance(error, OSError):
        return f"{error.strerror or error} (os error {error.errno})"
    return "file name contained an unexpected NUL byte" if "null byte" in str(error) else str(error)


class context:  # noqa: N801 - reads as a statement
    """Puts words in front of an error that passes through, and behind; what the host refuses becomes a ConfigError."""

    __slots__ = ("_end", "_words")

    def __init__(self, words: str, end: str = "") -> None:
        self._words = words
        self._end = end

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, CrackleError):
            error.args = (f"{self._words}: {error}{self._end}",)
        elif error is not None and (reason := reason_of(error)) is not None:
            raise ConfigError(f"{self._words}: {reason}{self._end}") from error


class step:  # noqa: N801 - reads as a statement
    """Says what was being done, and to which file, when the host refuses it; other errors pass as they are."""

    __slots__ = ("_end", "_words")

    def __init__(self, words: str, path: str | None = None) -> None:
        self._words = words
        self._end = "" if path is None else f": {path}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # A path with a NUL is a ValueError.
        if isinstance(error, (OSError, ValueError)):
            raise ConfigError(f"{self._words}: {os_reason(error)}{self._end}") from None
