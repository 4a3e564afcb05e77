"""The API server: clients on a Unix socket, each request a command to the controller.

Each result an answer.

Everything happens in the main thread's loop without waiting: a client that sends or reads slowly only makes
itself wait. One descriptor is held in reserve, so that a process that has none left still answers: 503.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time

import msgspec

from crackle.api.http import HttpConnection
from crackle.api.routes import RequestError, find_route, parse
from crackle.errors import CrackleError, TooLargeError, reason_of
from crackle.runtime.loop import READABLE, WRITABLE
from crackle.telemetry.logger import DEBUG, INFO
from crackle.vmm.controller import LATENCIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

    from crackle.runtime.loop import Loop, Timer
    from crackle.vmm.controller import Controller

DEFAULT_PAYLOAD_LIMIT = 51200
MAX_CONNECTIONS = 64

# Seconds after a client's last answer (or its coming) when it gives way to a new one, where there is no room for both.
EVICTABLE_AFTER_S = 10.0

# Seconds until a listener that could not be served is looked at again.
_REST_S = 0.1

# Rounds of the loop until it is known who has gone of those that were accepted last; who comes next waits for that.
_PATIENCE = 8

# Seconds that are left to a client for what has been said to it already.
LINGER_S = 1.0

_READ_SIZE = 65536

# Bytes of a refused request that are still read, and ignored.
_MAX_IGNORED = 1 << 22

# Byte for byte as Firecracker's, the server's name apart: there is no reason phrase.
_HEAD = "HTTP/1.1 {} \r\nServer: Crackle API\r\nConnection: {}\r\n"

# What ends a connection is told in another form than what is wrong with a command, and is no JSON: it has a line break.
_REFUSAL = '{{ "error": "{}\nAll previous unanswered requests will be dropped." }}'
_TURNED_AWAY = (
    "HTTP/1.1 503\r\nServer: Crackle API\r\nConnection: close\r\nContent-Length: {}\r\n\r\n"
    '{{ "error": "{}" }}'
)
_OK = "200 OK"
_NO_CONTENT = "204 No Content"
_BAD_REQUEST = "400 Bad Request"
_TOO_LARGE = "413 Payload too large"
_INTERNAL = "500 Internal Server Error"

# Bytes of a request's body that the log shows.
_SHOWN_BODY = 1024

# Commands whose time is a metric.
_TIMED = {"pause": "pause_vm", "resume": "resume_vm", "load_snapshot": "load_snapshot"}


def response(status: str, body: bytes = b"", *, keep: bool = True, deprecated: bool = False) -> bytes:
    """The bytes of an answer, of whose status the number is told; ``body`` is JSON."""
    head = _HEAD.format(status[:3], "keep-alive" if keep else "close")
    if deprecated:
        head += "Deprecation: true\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def fault(status: str, message: str, *, keep: bool = True, deprecated: bool = False) -> bytes:
    """The bytes of an answer that says what went wrong."""
    body = msgspec.json.encode({"fault_message": message})
    return response(status, body, keep=keep, deprecated=deprecated)


class ApiServer:
    """Serves ``listener``, which it takes over, in ``loop``."""

    def __init__(
        self, loop: Loop, listener: socket, controller: Controller, payload_limit: int = DEFAULT_PAYLOAD_LIMIT
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._controller = controller
        self._payload_limit = payload_limit
        # The one that has been silent for the longest comes first.
        self._clients: dict[int, _Client] = {}
        self._reserve = -1
        self._patience = _PATIENCE
        listener.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.watch(self._listener.fileno(), self._accept, on_failure=self._rest)
            self._keep_reserve()

    def _keep_reserve(self) -> None:
        if self._reserve < 0:
            with contextlib.suppress(OSError):
                self._reserve = os.dup(self._listener.fileno())

    def _rest(self) -> None:
        """Look away for a while: a client that cannot be accepted would wake the loop for ever."""
        self._loop.forget(self._listener.fileno())
        self._loop.call_later(_REST_S, self._listen)

    def _accept(self, _events: int) -> None:
        for _ in range(MAX_CONNECTIONS):
            if len(self._clients) >= MAX_CONNECTIONS and self._patience:
                # Some of them may have gone already.
                self._patience -= 1
                return
            self._patience = _PATIENCE
            try:
                fd, _ = self._listener._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and (self._evict() or self._refuse()):
                    continue
                self._rest()
                return
            if len(self._clients) < MAX_CONNECTIONS or self._evict():
                self._admit(fd)
            else:
                _turn_away(fd, "Too many open connections")

    def _admit(self, fd: int) -> None:
        try:
            self._clients[fd] = _Client(self, fd)
        except BaseException:
            os.close(fd)
            raise

    def _evict(self) -> bool:
        """Close the client that has been silent for the longest, if that is long; whether that is so."""
        client = next(iter(self._clients.values()), None)
        if client is None or time.monotonic() - client.active < EVICTABLE_AFTER_S:
            return False
        client.close()
        return True

    def _refuse(self) -> bool:
        """Tell a client, by the descriptor in reserve, that there is none for it; False when that was of no use."""
        if self._reserve < 0:
            return False
        os.close(self._reserve)
        self._reserve = -1
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError as error:
            if isinstance(error, BlockingIOError):
                self._keep_reserve()
            return self._reserve >= 0
        _turn_away(fd, "The process has no file descriptors left: raise its limit (ulimit -n).")
        self._keep_reserve()
        return self._reserve >= 0

    def touched(self, client: _Client, fd: int) -> None:
        """It has taken some of an answer just now: it is the last to give way."""
        client.active = time.monotonic()
        del self._clients[fd]
        self._clients[fd] = client

    def serve(self, method: str, path: str, body: bytes, keep: bool) -> bytes:
        """Carry out one request and give the bytes of its answer. Never raises."""
        begin = time.monotonic_ns()
        answer = self._serve(method, path, body, keep)
        logger = self._controller.logger
        if logger.level >= DEBUG:
            logger.debug(f"Total previous API call duration: {(time.monotonic_ns() - begin) // 1000} us.")
        return answer

    def _serve(self, method: str, path: str, body: bytes, keep: bool) -> bytes:
        controller = self._controller
        logger = controller.logger
        if logger.level >= INFO:
            logger.info(
                f"The API server received a {method.capitalize()} request on {_quoted(path)}{_shown(path, body)}."
            )
        deprecated = False
        counts: dict[str, int] | None = None
        counter: str | None = None
        try:
            route, path_id = find_route(method, path, body)
            counter = route.counter
            if counter is not None:
                counts = controller.metrics.counters[f"{method.lower()}_api_requests"]
                counts[f"{counter}_count"] += 1
            request = parse(route, path_id, body)
            deprecated = request.deprecated
            if deprecated:
                controller.metrics.counters["deprecated_api"]["deprecated_http_api_calls"] += 1
                logger.warning(f"{method} /{path.strip('/')}: {route.deprecation}")
            latency = _TIMED.get(request.command.name)
            if request.command.name == "create_snapshot":
                latency = f"{request.command.resource.snapshot_type.lower()}_create_snapshot"
            if latency is None:
                result = controller.execute(request.command)
            else:
                begin = time.monotonic_ns()
                result = controller.execute(request.command)
                took_us = (time.monotonic_ns() - begin) // 1000
                controller.metrics.counters["latencies_us"][latency] = took_us
                logger.info(f"'{LATENCIES[latency]}' API request took {took_us} us.")
        except (CrackleError, OSError, ValueError, MemoryError, RuntimeError, ImportError) as error:
            if counts is not None and f"{counter}_fails" in counts:
                counts[f"{counter}_fails"] += 1
            message = str(error) if isinstance(error, CrackleError) else str(reason_of(error))
            status = _TOO_LARGE if isinstance(error, TooLargeError) else _BAD_REQUEST
            if not isinstance(error, RequestError):
                logger.error(f"Received Error. Status code: {status}. Message: {message}")
            else:
                logger.error(message)
            return fault(status, message, keep=keep, deprecated=deprecated)
        except Exception as error:
            message = f"Internal error: {type(error).__name__}: {error}"
            logger.error(message)
            return fault(_INTERNAL, message, keep=keep)
        if result is None:
            logger.info("The request was executed successfully. Status code: 204 No Content.")
            return response(_NO_CONTENT, keep=keep, deprecated=deprecated)
        logger.info("The request was executed successfully. Status code: 200 OK.")
        return response(_OK, msgspec.json.encode(result), keep=keep)

    def close(self) -> None:
        """Send what is ready to be sent, close every connection and stop listening; the socket file stays.

        A client that does not read has ``LINGER_S`` seconds for it.
        """
        self._send_the_rest(time.monotonic() + LINGER_S)
        for client in list(self._clients.values()):
            client.close()
        self._loop.forget(self._listener.fileno())
        self._listener.close()
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def disown(self) -> None:
        """In a forked process: close the copies of connections and listener, which are the parent's."""
        for client in list(self._clients.values()):
            client.disown()
        self._clients.clear()
        self._listener.close()
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def _send_the_rest(self, deadline: float) -> None:
        """Finish the answers that have been begun, until `deadline`, whatever else happens meanwhile."""
        poll = select.poll()
        for fd, client in self._clients.items():
            if client.sending:
                poll.register(fd, select.POLLOUT)
        while any(client.sending for client in self._clients.values()):
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                return
            for fd, _ in ready:
                client = self._clients[fd]
                client.send()
                if not client.sending:
                    poll.unregister(fd)


class _Client:
    """One connection. Owns its descriptor.

    Reads only while nothing is left to send, which bounds what is kept. A client whose request was refused may still be
    sending it, and would not read the answer if the connection were closed under its hands (RFC 9112, 9.6): for
    a while what it sends is read, and is nothing to anybody.
    """

    __slots__ = ("_fd", "_http", "_ignored", "_linger", "_server", "active", "sending")

    def __init__(self, server: ApiServer, fd: int) -> None:
        os.set_blocking(fd, False)
        self.active = time.monotonic()
        self._server = server
        self._fd = fd
        self._http = HttpConnection(server.serve, server._payload_limit)
        self._linger: Timer | None = None
        self._ignored = 0
        # Whether an answer has been begun, and some of it is left.
        self.sending = False
        server._loop.watch(fd, self._ready, on_failure=self.close)

    def _ready(self, _events: int) -> None:
        if self.sending:
            self.send()
            return
        try:
            data = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._ignored += len(data) if self._linger is not None else 0
        if not data or self._ignored > _MAX_IGNORED:
            self.close()
            return
        if self._linger is not None:
            return
        http = self._http
        http.feed(data)
        if http.refused:
            self._server._controller.logger.error(f"API request refused: {http.refused}")
            answer = response(_BAD_REQUEST, _REFUSAL.format(http.refused).encode(), keep=False)
            http.out += answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if http.head_only else answer
        if http.out or http.refused is not None:
            self.send()

    def send(self) -> None:
        """Send what there is, as far as it is taken now."""
        http = self._http
        try:
            sent = os.write(self._fd, http.out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.sending = False
            self.close()
            return
        del http.out[:sent]
        if sent:
            self._server.touched(self, self._fd)
        sending = bool(http.out)
        if sending is not self.sending:
            self.sending = sending
            self._server._loop.change(self._fd, WRITABLE if sending else READABLE)
        if not sending and http.refused is not None:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """The last answer is sent."""
        if not self._http.refused:
            self.close()
            return
        import _socket

        borrowed = _socket.socket(fileno=self._fd)
        try:
            borrowed.shutdown(_socket.SHUT_WR)
        finally:
            borrowed.detach()
        self._linger = self._server._loop.call_later(LINGER_S, self.close)

    def disown(self) -> None:
        """Close the descriptor alone."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Close the connection; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._linger is not None:
                self._server._loop.cancel(self._linger)
            self._server._clients.pop(fd, None)
            self._server._loop.forget(fd)
            os.close(fd)


def _turn_away(fd: int, message: str) -> None:
    """Say why, as far as that can be said without waiting, and hang up."""
    os.set_blocking(fd, False)
    with contextlib.suppress(OSError):
        os.write(fd, _TURNED_AWAY.format(len(message) + 15, message).encode())
    os.close(fd)


def _shown(path: str, body: bytes) -> str:
    """The body as the log may show it: metadata and CPU templates stay out of it."""
    if not body or path.startswith(("/mmds", "/cpu-config")):
        return ""
    text = body[:_SHOWN_BODY].decode(errors="backslashreplace")
    return f" with body {_quoted(text)}" + ("..." if len(body) > _SHOWN_BODY else "")


def _quoted(text: str) -> str:
    """`text` in double quotes, as log readers expect it, on one line whatever it holds."""
    return msgspec.json.encode(text).decode()
