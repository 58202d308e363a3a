"""An HTTP proxy between a client and a server, over real sockets, that does what networks and servers do.

For each request `choose(method, target, nth)` names a fault or None; nth counts the requests of that
method for that target from 0, so a seeded choice is the same however requests interleave.

- "unavailable": 503 SlowDown; the server never sees the request.
- "reset": the connection is reset; the server never sees the request.
- "drop": the server has done it and answered; the connection is reset, no byte of the answer arrives.
- "truncate": the answer's head and half of its body (of an empty one: half of the head) arrive.
- "unimplemented": 501 NotImplemented; the server never sees the request.
- "stall": half of the answer arrives, then nothing for `stall_s`, then the end.
"""

import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable

KINDS = ("unavailable", "unimplemented", "reset", "drop", "truncate", "stall")
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_NOT_IMPLEMENTED = b"<?xml version='1.0'?><Error><Code>NotImplemented</Code><Message>A header you provided implies functionality that is not implemented</Message></Error>"
_REFUSALS = {
    fault: b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s"
    % (status, len(body), body)
    for fault, status, body in (
        ("unavailable", b"503 Slow Down", _SLOW_DOWN),
        ("unimplemented", b"501 Not Implemented", _NOT_IMPLEMENTED),
    )
}


class FaultProxy:
    """Listens on 127.0.0.1; `port`, and `injected`: how often each (fault, method, target) was done."""

    def __init__(
        self,
        server_port: int,
        choose: Callable[[str, str, int], str | None],
        stall_s: float = 1.0,
        ignored: tuple[str, ...] = (),
    ) -> None:
        self._ignored = tuple(f"{name}:".lower().encode() for name in ignored)
        self._server_port, self._choose, self._stall_s = server_port, choose, stall_s
        self._requests: Counter[tuple[str, str]] = Counter()
        self.injected: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._acceptor.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends accept
        self._listener.close()
        self._acceptor.join()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = None
        try:
            with contextlib.suppress(OSError, EOFError):
                incoming = _Incoming(client)
                while not self._closed.is_set():
                    method, target, request = incoming.request(client, self._ignored)
                    fault = self._fault(method, target)
                    if fault in _REFUSALS:
                        client.sendall(_REFUSALS[fault])
                        continue
                    if fault == "reset":
                        return _reset(client)
                    if server is None:
                        server = socket.create_connection(("127.0.0.1", self._server_port))
                        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        answers = _Incoming(server)
                    server.sendall(request)
                    head, body = answers.reply(method)
                    if fault == "drop":
                        return _reset(client)
                    whole = head + body
                    if fault in ("truncate", "stall"):
                        client.sendall(whole[: len(head) + len(body) // 2 if body else len(head) // 2])
                        if fault == "stall":
                            self._closed.wait(self._stall_s)
                        return
                    client.sendall(whole)
        finally:
            client.close()
            if server is not None:
                server.close()

    def _fault(self, method: str, target: str) -> str | None:
        with self._lock:
            nth = self._requests[method, target]
            self._requests[method, target] += 1
        fault = self._choose(method, target, nth)
        if fault is not None:
            assert fault in KINDS, fault
            with self._lock:
                self.injected[fault, method, target] += 1
        return fault


class _Incoming:
    """The messages that arrive on one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer = connection, b""

    def request(self, client: socket.socket, ignored: tuple[bytes, ...] = ()) -> tuple[str, str, bytes]:
        """(method, target, all bytes but headers that begin so); EOFError at the end of the connection."""
        head, fields = self._head()
        if fields.get("expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            ignored = (*ignored, b"expect:")
        if ignored:
            lines = head.split(b"\r\n")
            head = b"\r\n".join(line for line in lines if not line.lower().startswith(ignored))
        method, target, _ = head.split(b" ", 2)
        return method.decode(), target.decode(), head + self._body(fields)

    def reply(self, method: str) -> tuple[bytes, bytes]:
        """(head, body) of the answer to a request."""
        head, fields = self._head()
        empty = method == "HEAD" or head.split(b" ", 2)[1] in (b"204", b"304")
        return head, b"" if empty else self._body(fields)

    def _head(self) -> tuple[bytes, dict[str, str]]:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            self._more()
        head, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
        lines = head.decode("latin-1").split("\r\n")[1:-2]
        pairs = (line.split(":", 1) for line in lines)
        return head, {name.strip().lower(): value.strip() for name, value in pairs}

    def _body(self, fields: dict[str, str]) -> bytes:
        if fields.get("transfer-encoding", "").lower() != "chunked":
            return self._take(int(fields.get("content-length", 0)))
        out = b""
        while True:
            while (end := self._buffer.find(b"\r\n")) < 0:
                self._more()
            size = int(self._buffer[:end].split(b";")[0], 16)
            out += self._take(end + 2 + size + 2)
            if size == 0:
                return out

    def _take(self, n: int) -> bytes:
        pieces, have = [self._buffer], len(self._buffer)
        while have < n:
            self._buffer = b""
            self._more()
            pieces.append(self._buffer)
            have += len(self._buffer)
        whole = b"".join(pieces)
        self._buffer = whole[n:]
        return whole[:n]

    def _more(self) -> None:
        data = self._connection.recv(1 << 16)
        if not data:
            raise EOFError
        self._buffer += data


def _reset(connection: socket.socket) -> None:
    """Close with RST rather than FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
