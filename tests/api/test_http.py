"""How the API speaks HTTP, whatever is said: connections, framing, limits, malformed requests."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import Vmm

MACHINE = {"vcpu_count": 2, "mem_size_mib": 64}


def test_an_answer_with_a_body_has_firecrackers_headers(vmm: Vmm) -> None:
    answer = vmm.request("GET", "/")
    assert answer.status == 200
    assert answer.headers == {
        "server": "Crackle API",
        "connection": "keep-alive",
        "content-type": "application/json",
        "content-length": str(len(answer.body)),
    }


def test_an_answer_without_a_body_says_nothing_about_one(vmm: Vmm) -> None:
    answer = vmm.request("PUT", "/machine-config", MACHINE)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers == {"server": "Crackle API", "connection": "keep-alive"}


def test_a_connection_serves_many_requests(vmm: Vmm) -> None:
    for count in range(1, 30):
        assert vmm.request("PUT", "/machine-config", {**MACHINE, "mem_size_mib": count}).status == 204
        assert vmm.request("GET", "/machine-config").json["mem_size_mib"] == count


def test_requests_sent_at_once_are_answered_in_their_order(vmm: Vmm) -> None:
    client = vmm.client
    client.send(
        client.encode("PUT", "/machine-config", MACHINE)
        + client.encode("GET", "/machine-config")
        + client.encode("GET", "/nowhere")
        + client.encode("GET", "/version")
    )
    answers = [client.receive() for _ in range(4)]
    assert [answer.status for answer in answers] == [204, 200, 400, 200]
    assert answers[1].json["vcpu_count"] == 2
    assert "firecracker_version" in answers[3].json


def test_a_request_may_arrive_in_any_pieces(vmm: Vmm) -> None:
    choice = random.Random(7)
    text = vmm.client.encode("PUT", "/machine-config", MACHINE) + vmm.client.encode("GET", "/machine-config")
    for _ in range(10):
        rest = text
        while rest:
            size = choice.randint(1, 12)
            vmm.client.send(rest[:size])
            rest = rest[size:]
            time.sleep(0.0005)
        assert vmm.client.receive().status == 204
        assert vmm.client.receive().json["mem_size_mib"] == 64


def test_several_clients_are_served_at_once(vmm: Vmm) -> None:
    clients = [vmm.connect() for _ in range(20)]
    for client in clients:
        client.send(client.encode("GET", "/"))
    for client in reversed(clients):
        assert client.receive().status == 200


def test_a_client_that_stops_in_the_middle_of_a_request_delays_nobody(vmm: Vmm) -> None:
    slow = vmm.connect()
    slow.send(b"PUT /machine-config HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    for _ in range(10):
        assert vmm.request("GET", "/").status == 200


def test_a_client_that_never_reads_delays_nobody_and_loses_nothing(vmm: Vmm) -> None:
    slow = vmm.connect()
    slow.socket.settimeout(2)
    sent = 0
    flood = slow.encode("GET", "/vm/config") * 100_000
    with contextlib.suppress(TimeoutError):
        while sent < len(flood):
            sent += slow.socket.send(flood[sent : sent + 65536])
    assert sent < len(flood), "the answers should have filled the socket"
    for _ in range(10):
        assert vmm.request("GET", "/").status == 200
    slow.socket.settimeout(20)
    whole = sent // len(slow.encode("GET", "/vm/config"))
    assert all(slow.receive().status == 200 for _ in range(whole))


def test_a_client_that_goes_away_leaves_no_trace(vmm: Vmm) -> None:
    for _ in range(150):
        client = vmm.connect()
        client.send(b"GET / HTTP")
        client.close()
    assert vmm.request("GET", "/").status == 200


def test_a_crowd_that_has_gone_before_it_is_looked_at_keeps_nobody_out(vmm: Vmm) -> None:
    vmm.process.send_signal(signal.SIGSTOP)
    for _ in range(63):
        client = vmm.connect()
        client.send(b"GET / HTTP")
        client.close()
    late = vmm.connect()
    vmm.process.send_signal(signal.SIGCONT)
    assert late.request("GET", "/").status == 200


def test_one_client_too_many_is_told_so(vmm: Vmm) -> None:
    clients = [vmm.connect() for _ in range(63)]
    assert all(client.request("GET", "/").status == 200 for client in clients)
    extra = vmm.connect()
    answer = extra.receive()
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    assert answer.body == b'{ "error": "Too many open connections" }'
    assert extra.hung_up()
    clients[0].close()
    time.sleep(0.05)
    assert vmm.connect().request("GET", "/").status == 200


def test_a_body_may_come_in_chunks(vmm: Vmm) -> None:
    vmm.client.send(
        b"PUT /machine-config HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'10\r\n{"vcpu_count": 2\r\n15\r\n, "mem_size_mib": 32}\r\n0\r\n\r\n'
    )
    assert vmm.client.receive().status == 204
    assert vmm.request("GET", "/machine-config").json["mem_size_mib"] == 32


def test_a_client_that_expects_to_be_asked_is_asked_for_its_body(vmm: Vmm) -> None:
    body = b'{"vcpu_count": 1, "mem_size_mib": 32}'
    vmm.client.send(
        b"PUT /machine-config HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    assert vmm.client.receive().status == 100
    vmm.client.send(body)
    assert vmm.client.receive().status == 204


def test_a_client_that_expects_to_be_asked_for_too_much_is_refused_at_once(vmm: Vmm) -> None:
    vmm.client.send(b"PUT /mmds HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 999999\r\n\r\n")
    assert vmm.client.receive().status == 400


def test_a_client_that_wants_to_close_gets_its_answer_first(vmm: Vmm) -> None:
    vmm.client.send(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
    answer = vmm.client.receive()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert vmm.client.hung_up()


def test_http_1_0_closes_unless_asked_to_keep(vmm: Vmm) -> None:
    vmm.client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert vmm.client.receive().status == 200
    assert vmm.client.hung_up()


def test_the_absolute_form_of_a_request_means_its_path(vmm: Vmm) -> None:
    for target, field in (
        ("http://localhost/version", "firecracker_version"),
        ("http://localhost", "app_name"),
    ):
        assert field in vmm.request("GET", target).json


# The limit on bodies


@pytest.mark.parametrize("given", [None, 1000])
def test_a_body_of_the_limit_is_read_and_a_larger_one_is_refused(
    start: Callable[..., Vmm], given: int | None
) -> None:
    limit = given or 51200
    vmm = start(*(() if given is None else ("--http-api-max-payload-size", str(given))), fake=True)
    body = b'{"vcpu_count": 1, "mem_size_mib": 32}'
    assert vmm.request("PUT", "/machine-config", body.ljust(limit)).status == 204
    answer = vmm.request("PUT", "/machine-config", body.ljust(limit + 1))
    assert answer.status == 400
    assert answer.refusal == (
        f"Request payload with size {limit + 1} is larger than the limit of {limit} allowed by server."
    )
    assert vmm.client.hung_up()


def test_the_limit_holds_for_bodies_of_unknown_size(start: Callable[..., Vmm]) -> None:
    vmm = start("--http-api-max-payload-size", "100", fake=True)
    chunk = b"32\r\n" + b" " * 50 + b"\r\n"
    vmm.client.send(b"PUT /machine-config HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 3)
    answer = vmm.client.receive()
    assert answer.status == 400
    assert "limit of 100" in answer.refusal


# Malformed requests

MALFORMED = [
    b"hello\r\n\r\n",
    b"GET\r\n\r\n",
    b"get / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\n\r\n",
    b"CONNECT / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/2.0\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\nHost: x\n\n",
    b"GET /\xff HTTP/1.1\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\n\r\n",
    b"GET version HTTP/1.1\r\n\r\n",
    b"PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"PUT / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"PUT / HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"a" * 200000 + b"\r\n",
]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:40].decode(errors="replace"))
def test_a_malformed_request_gets_one_answer_and_its_connection_ends(vmm: Vmm, text: bytes) -> None:
    other = vmm.connect()
    with contextlib.suppress(BrokenPipeError):
        vmm.client.send(text)
    answer = vmm.client.receive()
    while answer.status == 200:
        answer = vmm.client.receive()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert answer.refusal
    assert vmm.client.hung_up()
    assert other.request("GET", "/").status == 200


# Each with the words that clients of Firecracker know.
WORDS = [
    (b"GET\r\n", "Invalid request."),
    (b"POST / HTTP/1.1\r\n", "Invalid HTTP Method: Unsupported HTTP method."),
    (b"GET  HTTP/1.1\r\n", "Invalid URI: Empty URI not allowed."),
    (b"GET /\xff HTTP/1.1\r\n", "Invalid URI: Cannot parse URI as UTF-8."),
    (b"GET / HTTP/2.0\r\n", "Invalid HTTP Version: Unsupported HTTP version."),
    (b"GET /a b HTTP/1.1\r\n", "Invalid HTTP Version: Unsupported HTTP version."),
    (
        b"GET / HTTP/1.1\r\nFoo\r\n",
        "Invalid header. Reason: Header is incorrectly formatted. Key: Foo",
    ),
    (
        b"GET / HTTP/1.1\r\nA: \xff\r\n",
        "Invalid header. Reason: Header contains invalid characters. "
        "Key: invalid utf-8 sequence of 1 bytes from index 3",
    ),
    (
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n",
        "Invalid header. Reason: Invalid value. Key:Content-Length; Value: x",
    ),
    (
        b"GET / HTTP/1.1\r\nAccept-Encoding: identity;q=0\r\n",
        "Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value:identity;q=0",
    ),
    (b"GET / HTTP/1.1\r\nAccept-Encoding: \r\n", "Invalid request."),
]


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_what_is_wrong_with_a_request_is_told_in_firecrackers_words(
    vmm: Vmm, text: bytes, words: str
) -> None:
    vmm.client.send(text)
    answer = b""
    while part := vmm.client.socket.recv(65536):
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body.decode() == (
        '{ "error": "' + words + '\nAll previous unanswered requests will be dropped." }'
    )
    assert head.decode().split("\r\n") == [
        "HTTP/1.1 400 ",
        "Server: Crackle API",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]


def test_requests_before_a_malformed_one_are_answered(vmm: Vmm) -> None:
    vmm.client.send(vmm.client.encode("GET", "/version") + b"garbage\r\n\r\n")
    assert vmm.client.receive().status == 200
    assert vmm.client.receive().status == 400
    assert vmm.client.hung_up()


def test_random_bytes_upset_nothing(vmm: Vmm) -> None:
    choice = random.Random(11)
    pieces = [
        b"GET ",
        b"/",
        b"PUT ",
        b" HTTP/1.1",
        b"\r\n",
        b"\r\n\r\n",
        b"Content-Length: ",
        b"5",
        b"{",
        b"\0",
        b"\xff",
    ]
    for _ in range(200):
        client = vmm.connect()
        try:
            client.send(b"".join(choice.choices(pieces, k=choice.randint(1, 30))))
        finally:
            client.close()
    assert vmm.request("GET", "/").status == 200
    assert vmm.process.poll() is None


def test_a_refused_head_request_is_answered_without_a_body(vmm: Vmm) -> None:
    vmm.client.send(b"HEAD / HTTP/1.1\r\n\r\n")
    answer = b""
    while part := vmm.client.socket.recv(65536):
        answer += part
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"\r\n\r\n") == 1


def test_a_client_that_sends_a_body_that_is_refused_can_send_it_and_reads_the_answer(vmm: Vmm) -> None:
    body = b"x" * 1_000_000
    # Blocking, as simple clients are: all of it is sent before anything is read.
    vmm.client.send(vmm.client.encode("PUT", "/mmds", body))
    answer = vmm.client.receive()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert "larger than the limit" in answer.refusal
    assert vmm.client.hung_up()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_answers_that_were_begun_are_sent_whole_before_the_process_ends(
    vmm: Vmm, number: signal.Signals
) -> None:
    many = 400
    document = {"key": "x" * 2000}
    assert vmm.request("PUT", "/mmds", document).status == 204
    vmm.client.send(vmm.client.encode("GET", "/mmds") * many)
    # The first answer is read, so the others have been begun as far as the socket takes them.
    assert vmm.client.receive().json == document
    vmm.process.send_signal(number)
    for _ in range(many - 1):
        assert vmm.client.receive().json == document
    assert vmm.client.hung_up()
    vmm.wait()


def test_a_client_that_never_reads_does_not_keep_the_process_from_ending(vmm: Vmm) -> None:
    slow = vmm.connect()
    assert slow.request("PUT", "/mmds", {"key": "x" * 10_000}).status == 204
    slow.send(slow.encode("GET", "/mmds") * 400)
    assert vmm.request("GET", "/").status == 200
    vmm.process.terminate()
    assert vmm.wait() == -signal.SIGTERM
