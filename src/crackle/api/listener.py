"""The API's listening socket: it appears under its name when it can be connected to."""

from __future__ import annotations

# The C module itself: the socket module drags in selectors and enum, several milliseconds.
import _socket
import os

from crackle.errors import ConfigError, os_reason

# Connections that wait to be accepted.
_BACKLOG = 128

# Bytes of a socket's name (unix(7), sun_path, its NUL not counted).
_PATH_MAX = 107


def listen(path: str) -> _socket.socket:
    """A socket that listens at `path`, where nothing may be yet. ConfigError."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        if not _listen_first(listener, path):
            listener.bind(path)
            listener.listen(_BACKLOG)
    except (OSError, ValueError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno in (17, 98):  # EEXIST, EADDRINUSE
            raise ConfigError(
                f"Failed to open the API socket at: {path}. Check that it is not already used."
            ) from None
        reason = os_reason(error) if isinstance(error, OSError) and error.errno else error
        raise ConfigError(f"Failed to bind and run the HTTP server: IO error: {reason}: {path}") from None
    return listener


def _listen_first(listener: _socket.socket, path: str) -> bool:
    """Listen under another name in the same directory, then give the socket its own; False where no other name fits."""
    unique = os.urandom(3).hex()
    other = f"{path}.{unique}"
    if len(os.fsencode(other)) > _PATH_MAX:
        other = os.path.join(os.path.dirname(path), unique)
    if not path or max(len(os.fsencode(path)), len(os.fsencode(other))) > _PATH_MAX:
        return False
    listener.bind(other)
    try:
        listener.listen(_BACKLOG)
        try:
            os.link(other, path)
        except OSError as error:
            if error.errno not in (1, 38, 95):  # EPERM, ENOSYS, EOPNOTSUPP: no second names here
                raise
            if os.path.lexists(path):
                raise FileExistsError(17, "File exists") from None
            os.rename(other, path)
    finally:
        if os.path.lexists(other):
            os.unlink(other)
    return True
