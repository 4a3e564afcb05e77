"""HTTP/1.1 on one connection: bytes in, requests out (RFC 9112).

Keep-alive, pipelining, ``Expect: 100-continue`` and chunked bodies work; an upgrade that is offered is not taken; what
is malformed or too large ends the connection after one answer. What is wrong is told in the words that Firecracker's
HTTP server has for it, which clients know: no general parser has them, and this one needs no import.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    # Method, path, body, whether the connection stays open.
    Serve = Callable[[str, str, bytes, bool], bytes]

# Bytes of request line and header fields together, and of the lines between chunks.
MAX_HEAD_SIZE = 16384

# Bytes of a body that a header may announce at all.
_MAX_LENGTH = 0xFFFF_FFFF

CONTINUE = b"HTTP/1.1 100 \r\nServer: Crackle API\r\nConnection: keep-alive\r\n\r\n"

_METHODS = frozenset((b"GET", b"PUT", b"PATCH", b"DELETE"))
_VERSIONS = frozenset((b"HTTP/1.1", b"HTTP/1.0"))
_FIELDS = frozenset(("accept-encoding", "connection", "content-length", "expect", "transfer-encoding"))
_SCHEME = "http://"
_CRLF = b"\r\n"
_END = b"\r\n\r\n"

_INVALID = "Invalid request."
_HEADER = "Invalid header. Reason:"


class RefusedError(Exception):
    """The connection cannot go on; the message is the last answer."""


class HttpConnection:
    """Feeds on the bytes of one client and calls ``serve`` for each complete request.

    Its answers go to ``out``, one for each request.
    """

    __slots__ = (
        "_body",
        "_body_limit",
        "_chunked",
        "_expects",
        "_head_size",
        "_keep",
        "_left",
        "_length",
        "_method",
        "_old",
        "_path",
        "_read",
        "_received",
        "_searched",
        "_serve",
        "head_only",
        "out",
        "refused",
    )

    def __init__(self, serve: Serve, body_limit: int) -> None:
        self._serve = serve
        self._body_limit = body_limit
        self._received = bytearray()
        # How much of it is known to have no end of a line.
        self._searched = 0
        self.out = bytearray()
        # Whether the present request is one whose answer has no body (RFC 9110, 9.3.2).
        self.head_only = False
        # Why the connection ends, once it does.
        self.refused: str | None = None
        self._begin()

    def _begin(self) -> None:
        """Be ready for the next request."""
        # What takes the next of what is received; False when that is not enough.
        self._read: Callable[[], bool] = self._read_request_line
        self._head_size = 0
        self._method = self._path = ""
        self._old = False
        self._keep: bool | None = None
        self._length: int | None = None
        self._chunked = False
        self._expects = False
        self._body = bytearray()
        # Bytes of the body, or of its present chunk, that are to come yet.
        self._left = 0

    def feed(self, data: bytes) -> None:
        """Take ``data`` from the client.

        Afterwards ``out`` has what to send, and ``refused`` is set if that is the last.
        """
        if self.refused is not None:
            return
        self._received += data
        try:
            while self.refused is None and self._read():
                pass
        except RefusedError as error:
            self.refused = str(error)
        if self.refused is not None:
            self._received.clear()

    # One part of a request each

    def _read_request_line(self) -> bool:
        if self._read_whole_head():
            return True
        line = self._line(_INVALID)
        if line:
            self._take_request_line(line)
            self._read = self._read_field
        # Empty lines before a request are nothing (RFC 9112, 2.2).
        return line is not None

    def _read_whole_head(self) -> bool:
        """Read request line and header fields where they are all there, as mostly they are."""
        size = self._received.find(_END) + len(_END)
        if not len(_END) < size <= MAX_HEAD_SIZE:
            return False
        head = bytes(self._received[: size - len(_END)])
        lines = head.split(_CRLF)
        if not lines[0] or head.count(b"\n") != len(lines) - 1:
            return False
        del self._received[:size]
        self._searched = 0
        self._take_request_line(lines[0])
        for line in lines[1:]:
            self._take_field(line)
        self._end_head()
        return True

    def _take_request_line(self, line: bytes) -> None:
        method, space, rest = line.partition(b" ")
        target, another, version = rest.partition(b" ")
        self.head_only = method == b"HEAD"
        if not (space and another):
            raise RefusedError(_INVALID)
        if method not in _METHODS:
            raise RefusedError("Invalid HTTP Method: Unsupported HTTP method.")
        if not target:
            raise RefusedError("Invalid URI: Empty URI not allowed.")
        try:
            uri = target.decode()
        except UnicodeDecodeError:
            raise RefusedError("Invalid URI: Cannot parse URI as UTF-8.") from None
        if version not in _VERSIONS:
            raise RefusedError("Invalid HTTP Version: Unsupported HTTP version.")
        self._method, self._path = method.decode(), _path_of(uri)
        self._old = version == b"HTTP/1.0"

    def _read_field(self) -> bool:
        line = self._line(f"{_HEADER} Invalid content length. Header: more than {MAX_HEAD_SIZE} bytes")
        if line is None:
            return False
        if line:
            self._take_field(line)
        else:
            self._end_head()
        return True

    def _end_head(self) -> None:
        """Say what comes now: a body, or nothing."""
        if self._chunked:
            # Which of them frames the body, client and server may see otherwise (RFC 9112, 6.1).
            if self._length is not None:
                raise RefusedError(_INVALID)
            self._ask_for_body()
            self._read = self._read_chunk_size
        elif not self._length:
            self._finish()
        else:
            self._check_size(self._length)
            self._ask_for_body()
            self._left = self._length
            self._read = self._read_body

    def _read_body(self) -> bool:
        if not self._take_body():
            return False
        self._finish()
        return True

    def _read_chunk_size(self) -> bool:
        line = self._line(_INVALID)
        if line is None:
            return False
        digits = line.partition(b";")[0].strip()
        try:
            # More digits than any size that is allowed has, and what Python takes beyond hexadecimal digits.
            if len(digits) > 16 or not digits.isalnum():
                raise ValueError
            size = int(digits, 16)
        except ValueError:
            raise RefusedError(_INVALID) from None
        self._check_size(len(self._body) + size)
        self._left = size
        self._head_size = 0
        self._read = self._read_chunk if size else self._read_trailer
        return True

    def _read_chunk(self) -> bool:
        if not self._take_body():
            return False
        self._read = self._read_chunk_end
        return True

    def _read_chunk_end(self) -> bool:
        line = self._line(_INVALID)
        if line:
            raise RefusedError(_INVALID)
        if line is not None:
            self._read = self._read_chunk_size
        return line is not None

    def _read_trailer(self) -> bool:
        line = self._line(_INVALID)
        if line == b"":
            self._finish()
        return line is not None

    # What they have in common

    def _line(self, too_long: str) -> bytes | None:
        """The next line, without its end; None when there is none yet, RefusedError when it is `too_long`."""
        received = self._received
        size = received.find(b"\n", self._searched) + 1
        if self._head_size + (size or len(received)) > MAX_HEAD_SIZE:
            raise RefusedError(too_long)
        if not size:
            self._searched = len(received)
            return None
        line = bytes(received[:size])
        del received[:size]
        self._searched = 0
        self._head_size += size
        if not line.endswith(_CRLF):
            raise RefusedError(_INVALID)
        return line.removesuffix(_CRLF)

    def _take_field(self, line: bytes) -> None:
        try:
            name, colon, value = line.decode().partition(":")
        except UnicodeDecodeError as error:
            raise RefusedError(
                f"{_HEADER} Header contains invalid characters. Key: {_where(error)}"
            ) from None
        if not colon:
            raise RefusedError(f"{_HEADER} Header is incorrectly formatted. Key: {name}")
        key = name.strip().lower()
        if key not in _FIELDS:
            return
        words = value.strip()
        if key == "content-length":
            digits = words.removeprefix("+")
            length = (
                int(digits)
                if digits.isascii() and digits.isdecimal() and len(digits) < 20
                else _MAX_LENGTH + 1
            )
            if length > _MAX_LENGTH or self._length not in (None, length):
                raise _invalid_value(name, value)
            self._length = length
        elif key == "transfer-encoding":
            self._chunked = words.lower().rpartition(",")[2].strip() == "chunked"
        elif key == "expect":
            self._expects = words.lower() == "100-continue"
        elif key == "connection":
            options = [option.strip() for option in words.lower().split(",")]
            if "close" in options:
                self._keep = False
            elif "keep-alive" in options and self._keep is None:
                self._keep = True
        else:
            _check_encodings(words)

    def _ask_for_body(self) -> None:
        # A client of HTTP/1.0 does not know the interim answer (RFC 9110, 10.1.1).
        if self._expects and not self._old:
            self.out += CONTINUE

    def _check_size(self, size: int) -> None:
        if size > self._body_limit:
            raise RefusedError(
                f"Request payload with size {size} is larger than the limit of {self._body_limit} "
                "allowed by server."
            )

    def _take_body(self) -> bool:
        """Take what there is of a body or chunk; whether that was all of it."""
        part = self._received[: self._left]
        del self._received[: self._left]
        self._body += part
        self._left -= len(part)
        return not self._left

    def _finish(self) -> None:
        """Serve the request, which is complete."""
        keep = not self._old if self._keep is None else self._keep
        self.out += self._serve(self._method, self._path, bytes(self._body), keep)
        self._begin()
        if not keep:
            self.refused = ""


def _path_of(uri: str) -> str:
    """The path of a request's target, which may be in the absolute form; RefusedError when it has none."""
    if uri.startswith(_SCHEME):
        return f"/{uri.removeprefix(_SCHEME).partition('/')[2]}"
    if not uri.startswith("/") or not uri.isprintable():
        raise RefusedError(_INVALID)
    return uri


def _check_encodings(words: str) -> None:
    """RefusedError when the client does not take an answer as it is (RFC 9110, 12.5.3)."""
    if not words:
        raise RefusedError(_INVALID)
    for encoding in words.split(","):
        one = encoding.strip()
        if one == "identity;q=0" or (one == "*;q=0" and "identity" not in words):
            raise _invalid_value("Accept-Encoding", encoding)


def _invalid_value(name: str, value: str) -> RefusedError:
    return RefusedError(f"{_HEADER} Invalid value. Key:{name}; Value:{value}")


def _where(error: UnicodeDecodeError) -> str:
    """What is no UTF-8, and where."""
    if error.reason == "unexpected end of data":
        return f"incomplete utf-8 byte sequence from index {error.start}"
    return f"invalid utf-8 sequence of {error.end - error.start} bytes from index {error.start}"
