"""The metadata service's requests and answers: HTTP/1.1 (RFC 9112) as far as a client of metadata needs it.

GET reads the document, PUT /latest/api/token opens a session; no request has a body. The status codes and words are
Firecracker's.
"""

from __future__ import annotations

import msgspec

from crackle.mmds.store import NotFoundError, UnsupportedError
from crackle.mmds.tcp import ROOM
from crackle.mmds.token import TokenAuthority

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.mmds.store import Store
    from crackle.schema.mmds import MmdsConfig

TOKEN_PATH = "/latest/api/token"

_TOKEN_HEADERS = ("x-metadata-token", "x-aws-ec2-metadata-token")
_TTL_HEADERS = ("x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds")
_FORWARDED_HEADERS = ("x-forwarded-for",)

_INVALID_REQUEST = "Invalid request."
_NO_TOKEN = (
    "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header "
    "to specify the session token."
)
_NO_TTL = (
    "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or `X-aws-ec2-metadata-token-ttl-seconds` "
    "header to specify the token's lifetime."
)

_PHRASES = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    501: "Not Implemented",
}
_JSON = "application/json"
_TEXT = "text/plain"

_MIN_LINE = len("GET / HTTP/1.1")
_MAX_U32 = 0xFFFF_FFFF


class HttpError(Exception):
    """A request that is answered with `status` and the message."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Request(msgspec.Struct):
    """A request without its body. Headers by their name in small letters, each with the name as it was sent."""

    method: str
    path: str
    version: str
    headers: dict[str, tuple[str, str]]

    def header(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Name and value of the first of `names` that there is."""
        return next((self.headers[name] for name in names if name in self.headers), None)

    def value(self, name: str) -> str:
        """The value of one header in small letters; empty without it."""
        return self.headers.get(name, ("", ""))[1].lower()


def find_end(data: bytearray) -> int:
    """Bytes of the first request in `data`; 0 if it is not whole yet."""
    ends = [at + len(mark) for mark in (b"\n\r\n", b"\n\n") if (at := data.find(mark)) >= 0]
    return min(ends, default=0)


def parse(head: bytes) -> Request:
    """The request in `head`, which ends in an empty line. HttpError."""
    line, newline, rest = head.partition(b"\r\n")
    parts = line.split(b" ", 2)
    if not newline or len(line) < _MIN_LINE or len(parts) != 3:
        raise HttpError(400, _INVALID_REQUEST)
    method, uri, version = parts
    if method not in (b"GET", b"PUT", b"PATCH", b"DELETE"):
        raise HttpError(501, "Unsupported HTTP method.")
    if not uri:
        raise HttpError(400, "Empty URI not allowed.")
    try:
        path = uri.decode()
    except UnicodeDecodeError:
        raise HttpError(400, "Cannot parse URI as UTF-8.") from None
    if version not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise HttpError(501, "Unsupported HTTP version.")
    request = Request(method.decode(), _absolute(path), version.decode(), _headers(rest))
    _check(request)
    return request


def _absolute(uri: str) -> str:
    """The path of a request's target, in whichever form it came; empty if it has none."""
    if uri.startswith("http://"):
        _, slash, path = uri.removeprefix("http://").partition("/")
        return slash + path
    return uri if uri.startswith("/") else ""


def _headers(data: bytes) -> dict[str, tuple[str, str]]:
    try:
        lines = data.decode().split("\r\n")
    except UnicodeDecodeError:
        raise HttpError(400, _INVALID_REQUEST) from None
    if lines[-2:] != ["", ""]:
        # It ended in an empty line, but not in the one that ends a header.
        raise HttpError(400, _INVALID_REQUEST)
    headers = {}
    for line in lines[:-2]:
        name, colon, value = line.partition(":")
        if not colon:
            raise HttpError(400, f"Header is incorrectly formatted. Key: {line}")
        headers[name.strip().lower()] = (name.strip(), value.strip())
    return headers


def _check(request: Request) -> None:
    """Refuse what the headers ask for and this service does not do."""
    name, length = request.headers.get("content-length", ("", "0"))
    if not _is_u32(length):
        raise HttpError(400, f"Invalid value. Key:{name}; Value: {length}")
    if int(length) or request.value("transfer-encoding") == "chunked":
        raise HttpError(400, _INVALID_REQUEST)
    encodings = [encoding.strip() for encoding in request.value("accept-encoding").split(",")]
    for encoding in encodings:
        if encoding == "identity;q=0" or (encoding == "*;q=0" and "identity" not in encodings):
            raise HttpError(400, f"Invalid value. Key:Accept-Encoding; Value:{encoding}")


def _is_u32(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= _MAX_U32


class Responder:
    """Answers requests for the document in `store`, as `config` says."""

    def __init__(self, config: MmdsConfig, store: Store) -> None:
        self.rx_no_token = 0
        self.rx_invalid_token = 0
        self._sessions_needed = config.version == "V2"
        self._imds_compat = config.imds_compat
        self._store = store
        self._tokens = TokenAuthority()

    def take(self, data: bytearray) -> tuple[bytes, bool] | None:
        """Take the first request off `data`: the bytes of its answer, and whether the connection then ends.

        None if there is no whole request.
        """
        end = find_end(data)
        if not end:
            if len(data) < ROOM:
                return None
            end = len(data)
        head = bytes(data[:end])
        del data[:end]
        version = "HTTP/1.1"
        # Where a request that cannot be read ends nobody knows.
        close = True
        headers: dict[str, str] = {}
        kind = _TEXT
        try:
            request = parse(head)
            version = request.version
            connection = request.value("connection")
            close = connection == "close" or (version == "HTTP/1.0" and connection != "keep-alive")
            kind, headers, body = self._serve(request)
            status = 200
        except HttpError as error:
            status, headers, body = error.status, error.headers, str(error)
        return _response(version, status, kind, headers, body.encode("utf-8", "surrogatepass"), close), close

    def _serve(self, request: Request) -> tuple[str, dict[str, str], str]:
        """Content type, further headers and body of the answer to a request that can be had. HttpError."""
        if not request.path:
            raise HttpError(400, "Invalid URI.")
        if request.method == "GET":
            self._check_session(request)
            kind = _JSON if request.value("accept") == _JSON and not self._imds_compat else _TEXT
            return kind, {}, self._read(request.path, kind)
        if request.method == "PUT":
            name, ttl_s = self._requested_ttl(request)
            try:
                return _TEXT, {name: str(ttl_s)}, self._tokens.issue(ttl_s)
            except ValueError as error:
                raise HttpError(400, str(error)) from None
        raise HttpError(405, "Not allowed HTTP method.", Allow="GET, PUT")

    def _check_session(self, request: Request) -> None:
        given = request.header(_TOKEN_HEADERS)
        if given is None:
            self.rx_no_token += 1
            problem = _NO_TOKEN
        elif not self._tokens.is_valid(given[1]):
            self.rx_invalid_token += 1
            problem = "MMDS token not valid."
        else:
            return
        # Version 1 counts what version 2 would refuse.
        if self._sessions_needed:
            raise HttpError(401, problem)

    def _read(self, path: str, kind: str) -> str:
        try:
            return self._store.text(_without_repeats(path), as_json=kind == _JSON)
        except NotFoundError:
            raise HttpError(404, f"Resource not found: {path}.") from None
        except UnsupportedError:
            raise HttpError(501, "Cannot retrieve value. The value has an unsupported type.") from None

    def _requested_ttl(self, request: Request) -> tuple[str, int]:
        """The header that says how long a session is to last, and how many seconds. HttpError."""
        forwarded = request.header(_FORWARDED_HEADERS)
        if forwarded is not None:
            # What comes by way of a proxy may not open a session.
            raise HttpError(400, f"Invalid header. Reason: Unsupported header name. Key: {forwarded[0]}")
        if _without_repeats(request.path) != TOKEN_PATH:
            raise HttpError(404, f"Resource not found: {request.path}.")
        given = request.header(_TTL_HEADERS)
        if given is None:
            raise HttpError(400, _NO_TTL)
        name, value = given
        if not _is_u32(value):
            raise HttpError(400, f"Invalid header. Reason: Invalid value. Key:{name}; Value:{value}")
        return name, int(value)


def _without_repeats(path: str) -> str:
    while "//" in path:
        path = path.replace("//", "/")
    return path


def _response(
    version: str, status: int, kind: str, headers: dict[str, str], body: bytes, close: bool
) -> bytes:
    lines = [
        f"{version} {status} {_PHRASES[status]}",
        "Server: Crackle MMDS",
        f"Connection: {'close' if close else 'keep-alive'}",
        *(f"{name}: {value}" for name, value in headers.items()),
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "\r\n",
    ]
    return "\r\n".join(lines).encode() + body
