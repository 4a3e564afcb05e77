"""HTTP of the API on one connection, byte by byte: one answer for each request, whatever else it asks for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.api.http import CONTINUE, MAX_HEAD_SIZE, HttpConnection

SETTINGS = b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" + SETTINGS
LIMIT = 100

# The bytes of a request, and what it is to the server: method, path, body; and whether it is asked for its body.
REQUESTS = [
    (b"GET /a HTTP/1.1\r\n\r\n", ("GET", "/a", b""), False),
    (b"GET /a HTTP/1.1\r\n" + OFFER + b"\r\n", ("GET", "/a", b""), False),
    (b"GET /a HTTP/1.1\r\nUpgrade: websocket\r\n\r\n", ("GET", "/a", b""), False),
    (b"PUT /b HTTP/1.1\r\nContent-Length: 5\r\n\r\n{\r\n\r\n", ("PUT", "/b", b"{\r\n\r\n"), False),
    (b"PUT /b HTTP/1.1\r\n" + OFFER + b"Content-Length: 3\r\n\r\nabc", ("PUT", "/b", b"abc"), False),
    (
        b"PATCH /c HTTP/1.1\r\n" + OFFER + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
        ("PATCH", "/c", b"abcde"),
        True,
    ),
    (
        b"PUT /d HTTP/1.1\r\nExpect: 100-Continue\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        ("PUT", "/d", b"a"),
        True,
    ),
    (b"PUT /e HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\na", ("PUT", "/e", b"a"), True),
    (b"GET /e HTTP/1.1\r\nExpect: 100-continue\r\n\r\n", ("GET", "/e", b""), False),
]


class Peer:
    """A connection whose answers are the numbers of the requests."""

    def __init__(self) -> None:
        self.served: list[tuple[str, str, bytes]] = []
        self.http = HttpConnection(self._serve, LIMIT)

    def _serve(self, method: str, path: str, body: bytes, _keep: bool) -> bytes:
        self.served.append((method, path, body))
        return b"<%d>" % len(self.served)

    def feed(self, data: bytes, size: int) -> None:
        for start in range(0, len(data), size):
            self.http.feed(data[start : start + size])


@given(st.lists(st.sampled_from(REQUESTS), max_size=6), st.integers(1, 400))
def test_each_request_has_one_answer_in_whatever_pieces_it_comes(requests, size: int) -> None:
    peer = Peer()
    peer.feed(b"".join(text for text, _, _ in requests), size)
    assert peer.served == [seen for _, seen, _ in requests]
    assert peer.http.refused is None
    answers = b"".join(
        (CONTINUE if asked else b"") + b"<%d>" % number for number, (_, _, asked) in enumerate(requests, 1)
    )
    assert bytes(peer.http.out) == answers


@pytest.mark.parametrize(
    "text",
    [
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\nzz\r\n",
        b"PUT / HTTP/1.1\r\n" + OFFER + b"Transfer-Encoding: chunked\r\n\r\n70\r\n" + b"x" * 112,
        b"PUT / HTTP/1.1\r\nContent-Length: 101\r\nExpect: 100-continue\r\n\r\n",
        b"PUT / HTTP/1.1\r\n" + OFFER + b"Content-Length: 101\r\n\r\n" + b"x" * 101,
        b"HEAD / HTTP/1.1\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
@pytest.mark.parametrize("size", [1, 13, 4096])
def test_what_is_refused_is_refused_once_and_nothing_after_it_is_served(text: bytes, size: int) -> None:
    peer = Peer()
    good = b"GET / HTTP/1.1\r\n\r\n"
    peer.feed(good + text, size)
    assert peer.served == [("GET", "/", b"")]
    assert peer.http.refused
    assert bytes(peer.http.out) == b"<1>"


def test_nothing_is_served_after_the_last_request_of_a_connection() -> None:
    peer = Peer()
    peer.feed(b"GET /a HTTP/1.1\r\nConnection: close\r\n\r\nGET /b HTTP/1.1\r\n\r\n", 4096)
    assert (peer.served, peer.http.refused, bytes(peer.http.out)) == ([("GET", "/a", b"")], "", b"<1>")


def test_a_client_of_an_old_version_is_not_asked_for_its_body() -> None:
    peer = Peer()
    peer.feed(b"PUT /a HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\na", 4096)
    assert bytes(peer.http.out) == b"<1>"


def test_whether_the_answer_may_have_a_body_is_known_when_a_request_is_refused() -> None:
    peer = Peer()
    peer.feed(b"HEAD / HTTP/1.1\r\n\r\n", 4096)
    assert peer.http.head_only


# What requests are made of, and what spoils them.
PIECES = [
    *(
        b"GET",
        b"PUT",
        b"HEAD",
        b" ",
        b"/",
        b"/a",
        b"x",
        b" HTTP/1.1",
        b" HTTP/1.0",
        b" HTTP/2.0",
        b"\r\n",
        b"\r\n\r\n",
    ),
    *(
        b"\n",
        b"\r",
        b":",
        b"\xff",
        b"\0",
        b"A: b\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: 101\r\n",
        b"{}{",
    ),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"Expect: 100-continue\r\n",
        b"3\r\n{}{\r\n",
        b"0\r\n",
    ),
    *(
        b"GET / HTTP/1.1\r\n",
        b"PUT /a HTTP/1.1\r\n",
        b"Accept-Encoding: identity;q=0\r\n",
        b"A: " + b"b" * 9000,
    ),
]


@given(st.lists(st.sampled_from(PIECES), max_size=24), st.integers(1, 40))
def test_what_a_client_sends_means_the_same_in_whatever_pieces_it_comes(
    pieces: list[bytes], size: int
) -> None:
    data = b"".join(pieces)
    whole, torn = Peer(), Peer()
    whole.feed(data, len(data) or 1)
    torn.feed(data, size)
    assert torn.served == whole.served
    assert torn.http.refused == whole.http.refused
    assert torn.http.out == whole.http.out
    assert len(torn.http._received) <= MAX_HEAD_SIZE
