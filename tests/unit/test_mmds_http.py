"""The guest's requests and their answers, to the status code and the word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.mmds.http import Responder
from crackle.mmds.tcp import ROOM
from crackle.schema.mmds import MmdsConfig
from support.metadata import body_of, get, store_of

DOCUMENT = {"foo": "bar", "latest": {"meta-data": {"ami-id": "ami-1", "n": 5}}}
NO_TOKEN = (
    "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the "
    "session token."
)
NO_TTL = (
    "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or "
    "`X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime."
)


def responder(version: str = "V1", imds_compat: bool = False) -> Responder:
    return Responder(MmdsConfig(["eth0"], version, None, imds_compat), store_of(DOCUMENT))  # type: ignore[arg-type]


def ask(service: Responder, request: bytes) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of the answer to `request`."""
    data = bytearray(request)
    taken = service.take(data)
    assert taken is not None, "no whole request"
    head, _, body = taken[0].decode().partition("\r\n\r\n")
    line, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert len(body.encode()) == int(headers["Content-Length"])
    assert taken[1] == (headers["Connection"] == "close")
    return int(line.split()[1]), headers, body


def put(path: str, *headers: str) -> bytes:
    return get(path, *headers).replace(b"GET", b"PUT", 1)


def token_of(service: Responder, header: str = "X-metadata-token-ttl-seconds") -> str:
    status, headers, token = ask(service, put("/latest/api/token", f"{header}: 60"))
    assert (status, headers[header]) == (200, "60")
    return token


def test_the_form_of_an_answer_is_what_the_client_accepts() -> None:
    service = responder()
    path = "/latest/meta-data"
    status, headers, body = ask(service, get(path))
    assert (status, headers["Content-Type"], body) == (200, "text/plain", "ami-id\nn")
    status, headers, body = ask(service, get(path, "Accept: application/json"))
    assert (status, headers["Content-Type"], body) == (200, "application/json", '{"ami-id":"ami-1","n":5}')
    assert ask(service, get(path, "Accept: */*"))[2] == "ami-id\nn"


def test_a_service_compatible_with_imds_knows_one_form() -> None:
    _, headers, body = ask(responder(imds_compat=True), get("/foo", "accept: application/json"))
    assert (headers["Content-Type"], body) == ("text/plain", "bar")


@pytest.mark.parametrize("path", ["/foo", "//foo", "/foo/", "http://169.254.169.254/foo", "http://x//foo"])
def test_a_path_may_be_written_in_several_ways(path: str) -> None:
    assert ask(responder(), get(path))[2] == "bar"


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (get("/nowhere/at//all"), 404, "Resource not found: /nowhere/at//all."),
        (get("/latest/meta-data/n"), 501, "Cannot retrieve value. The value has an unsupported type."),
        (get("http://169.254.169.254"), 400, "Invalid URI."),
        (get("foo"), 400, "Invalid URI."),
        (b"GET  HTTP/1.1\r\n\r\n", 400, "Invalid request."),
        (b"GET  HTTP/1.1 \r\n\r\n", 400, "Empty URI not allowed."),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "Cannot parse URI as UTF-8."),
        (b"GET / HTTP/2.0\r\n\r\n", 501, "Unsupported HTTP version."),
        (b"POST / HTTP/1.1\r\n\r\n", 501, "Unsupported HTTP method."),
        (b"get / HTTP/1.1\r\n\r\n", 501, "Unsupported HTTP method."),
        (b"GET\r\n\r\n", 400, "Invalid request."),
        (b"GET / HTTP/1.1\n\n", 400, "Invalid request."),
        (b"GET / HTTP/1.1\r\nHost: x\n\r\n", 400, "Invalid request."),
        (get("/", "nonsense"), 400, "Header is incorrectly formatted. Key: nonsense"),
        (get("/", "Content-Length: 100"), 400, "Invalid request."),
        (get("/", "Content-Length: x"), 400, "Invalid value. Key:Content-Length; Value: x"),
        (get("/", "Transfer-Encoding: chunked"), 400, "Invalid request."),
        (
            get("/", "Accept-Encoding: gzip, identity;q=0"),
            400,
            "Invalid value. Key:Accept-Encoding; Value:identity;q=0",
        ),
        (
            put("/latest/api/toke", "X-metadata-token-ttl-seconds: 60"),
            404,
            "Resource not found: /latest/api/toke.",
        ),
        (put("/latest/api/token"), 400, NO_TTL),
        (
            put("/latest/api/token", "X-metadata-token-ttl-seconds: soon"),
            400,
            "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:soon",
        ),
        (
            put("/", "X-Forwarded-For: foo"),
            400,
            "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For",
        ),
        (
            put("/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 21601"),
            400,
            "Invalid time to live value provided for token: 21601. Please provide a value between 1 and 21600.",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_in_words_clients_know(
    request_: bytes, status: int, message: str
) -> None:
    got, headers, body = ask(responder(), request_)
    assert (got, body, headers["Content-Type"]) == (status, message, "text/plain")


@pytest.mark.parametrize("method", [b"PATCH", b"DELETE"])
def test_other_methods_are_told_which_are_allowed(method: bytes) -> None:
    status, headers, body = ask(responder("V2"), get("/foo").replace(b"GET", method, 1))
    assert (status, headers["Allow"], body) == (405, "GET, PUT", "Not allowed HTTP method.")


@pytest.mark.parametrize("prefix", ["X-metadata-token", "X-aws-ec2-metadata-token", "x-METADATA-token"])
def test_version_2_wants_a_token_and_version_1_counts_its_absence(prefix: str) -> None:
    first, second = responder("V1"), responder("V2")
    for service in (first, second):
        token = token_of(service, f"{prefix}-ttl-seconds")
        assert ask(service, get("/foo", f"{prefix}: {token}"))[2] == "bar"
        assert (service.rx_no_token, service.rx_invalid_token) == (0, 0)
    assert ask(first, get("/foo"))[2] == "bar"
    assert ask(first, get("/foo", f"{prefix}: junk"))[2] == "bar"
    assert ask(second, get("/foo"))[::2] == (401, NO_TOKEN)
    assert ask(second, get("/foo", f"{prefix}: junk"))[::2] == (401, "MMDS token not valid.")
    for service in (first, second):
        assert (service.rx_no_token, service.rx_invalid_token) == (1, 1)


def test_a_connection_stays_unless_the_client_says_otherwise() -> None:
    service = responder()
    assert ask(service, get("/foo"))[1]["Connection"] == "keep-alive"
    assert ask(service, get("/foo", "Connection: close"))[1]["Connection"] == "close"
    old = get("/foo", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert ask(service, old)[1]["Connection"] == "keep-alive"
    assert ask(service, b"GET /foo HTTP/1.0\r\n\r\n")[1]["Connection"] == "close"
    assert service.take(bytearray(b"GET /foo HTTP/1.0\r\n\r\n"))[0].startswith(b"HTTP/1.0 200 ")  # type: ignore[index]


def test_requests_are_taken_one_at_a_time_and_only_when_whole() -> None:
    service = responder()
    data = bytearray(get("/foo") + get("/latest"))
    assert body_of(service.take(data)[0]) == b"bar"  # type: ignore[index]
    assert body_of(service.take(data)[0]) == b"meta-data/"  # type: ignore[index]
    assert data == b""
    whole = get("/foo")
    for size in range(len(whole)):
        assert service.take(bytearray(whole[:size])) is None


def test_a_request_that_does_not_fit_ends_the_connection() -> None:
    status, headers, body = ask(responder(), b"GET /" + b"a" * (ROOM - 5))
    assert (status, headers["Connection"], body) == (400, "close", "Invalid request.")


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: get("/", text)))
def test_no_request_raises(data: bytes) -> None:
    for version in ("V1", "V2"):
        taken = responder(version).take(bytearray(data + b"\r\n\r\n"))
        assert taken is not None
        assert taken[0].startswith(b"HTTP/1.")
