"""HTTP/1.1 on one connection: bytes in, requests out (RFC 9112), by way of llhttp.

Keep-alive, pipelining, ``Expect: 100-continue`` and chunked bodies work; an upgrade that is offered is not taken; what
is malformed or too large ends the connection after one answer.
"""

from __future__ import annotations

from httptools.parser.errors import HttpParserUpgrade
from httptools.parser.parser import HttpRequestParser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    # Method, path, body, whether the connection stays open.
    Serve = Callable[[str, str, bytes, bool], bytes]

# Bytes of request line and header fields together.
MAX_HEAD_SIZE = 16384

CONTINUE = b"HTTP/1.1 100 Continue\r\nServer: Crackle API\r\nConnection: keep-alive\r\n\r\n"

_HEAD_TOO_LARGE = f"Invalid request: its header is larger than {MAX_HEAD_SIZE} bytes."

_METHODS = frozenset((b"GET", b"PUT", b"PATCH", b"DELETE"))


class RefusedError(Exception):
    """The connection cannot go on; the message is the last answer."""


class HttpConnection:
    """Feeds on the bytes of one client and calls ``serve`` for each complete request.

    Its answers go to ``out``, one for each request.
    """

    __slots__ = (
        "_announced",
        "_began",
        "_body",
        "_body_limit",
        "_expects",
        "_has_body",
        "_head",
        "_head_size",
        "_in_head",
        "_parser",
        "_serve",
        "_url",
        "head_only",
        "out",
        "refused",
    )

    def __init__(self, serve: Serve, body_limit: int) -> None:
        self._serve = serve
        self._body_limit = body_limit
        self._parser = HttpRequestParser(self)
        self._url = b""
        self._body = bytearray()
        self._head: list[tuple[bytes, bytes]] = []
        self._expects = False
        self._has_body = False
        self._began = False
        self._in_head = False
        self._head_size = 0
        self.out = bytearray()
        # Whether the present request is one whose answer has no body (RFC 9110, 9.3.2).
        self.head_only = False
        # Why the connection ends, once it does.
        self.refused: str | None = None

    def feed(self, data: bytes) -> None:
        """Take ``data`` from the client.

        Afterwards ``out`` has what to send, and ``refused`` is set if that is the last.
        """
        self._began = False
        while True:
            try:
                self._parser.feed_data(data)
                break
            except HttpParserUpgrade as offer:
                # The parser takes what follows for another protocol: read it again as if there had been no offer.
                data = self._without_offer() + data[offer.args[0] :]
                self._parser = HttpRequestParser(self)
            except Exception as error:
                if self.refused is None:
                    self.refused = f"Invalid request: {error}."
                return
        if self._in_head and self.refused is None:
            # What the parser keeps of an unfinished header it has not told us of yet.
            if not self._began:
                self._head_size += len(data)
            if self._head_size > MAX_HEAD_SIZE:
                self.refused = _HEAD_TOO_LARGE

    # Called by the parser

    def on_message_begin(self) -> None:
        self._began = True
        self._in_head = True
        self.head_only = False
        self._head_size = 0
        self._url = b""
        self._body = bytearray()
        self._head = []
        self._expects = False
        self._has_body = False

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._grow_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._grow_head(len(name) + len(value))
        self._head.append((name, value))
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects = True
        elif name == b"transfer-encoding":
            self._has_body = True
        elif name == b"content-length":
            self._has_body = self._has_body or int(value) > 0
            if int(value) > self._body_limit:
                self._refuse_body(int(value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self.head_only = self._parser.get_method() == b"HEAD"
        if self._parser.get_method() not in _METHODS:
            self._refuse("Invalid HTTP Method: Unsupported HTTP method.")
        if self._parser.get_http_version() not in ("1.1", "1.0"):
            self._refuse("Invalid HTTP Version: Unsupported HTTP version.")
        # A client of HTTP/1.0 does not know the interim answer (RFC 9110, 10.1.1).
        if (
            self._expects
            and self._has_body
            and self._parser.get_http_version() == "1.1"
            and not self._parser.should_upgrade()
        ):
            self.out += CONTINUE

    def on_body(self, body: bytes) -> None:
        if len(self._body) + len(body) > self._body_limit:
            self._refuse_body(len(self._body) + len(body))
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return  # `feed` goes on with it
        url = self._url
        keep = self._parser.should_keep_alive()
        if not url.startswith(b"/") and b"://" in url:
            # The absolute form: what counts is the path.
            url = b"/" + url.partition(b"://")[2].partition(b"/")[2]
        try:
            path = url.decode()
        except UnicodeDecodeError:
            self._refuse("Invalid URI: Cannot parse URI as UTF-8.")
        method: str = self._parser.get_method().decode()
        self.out += self._serve(method, path, bytes(self._body), keep)
        if not keep:
            self.refused = ""

    def _without_offer(self) -> bytes:
        """The head of the request again, but for the offer to speak another protocol (RFC 9110, 7.8)."""
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (method, self._url, version)]
        lines += [b"%s: %s" % field for field in self._head if field[0].lower() != b"upgrade"]
        return b"\r\n".join((*lines, b"", b""))

    def _grow_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > MAX_HEAD_SIZE:
            self._refuse(_HEAD_TOO_LARGE)

    def _refuse_body(self, size: int) -> None:
        self._refuse(
            f"Request payload with size {size} is larger than the limit of {self._body_limit} "
            "allowed by server."
        )

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        raise RefusedError(reason)
