"""Each fault happens on the wire as the proxy says, to the client and to the server."""

import http.client
import http.server
import socket
import threading

import pytest
from fault_proxy import KINDS, FaultProxy

BODY = bytes(range(256)) * 40


class _Answering(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        size = int(self.headers.get("Content-Length", 0))
        self.server.seen.append((self.command, self.path, self.rfile.read(size)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(BODY)

    do_GET = do_PUT = do_HEAD = _answer

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as server:
        server.seen = []
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(proxy, method="GET", body=None, **headers):
    """(status, body) of one request on a fresh connection; raises what the client meets."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=0.3)
    try:
        connection.request(method, "/a/b?c", body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def proxy_with(server, fault, stall_s=5.0):
    """A proxy that does `fault` to each first request."""
    return FaultProxy(server.server_port, lambda method, target, nth: fault if nth == 0 else None, stall_s)


def test_without_faults_every_byte_passes(server):
    with proxy_with(server, None) as proxy:
        assert ask(proxy) == (200, BODY)
        assert ask(proxy, "PUT", BODY) == (200, BODY)
        assert ask(proxy, "HEAD") == (200, b"")
    assert server.seen == [("GET", "/a/b?c", b""), ("PUT", "/a/b?c", BODY), ("HEAD", "/a/b?c", b"")]
    assert not proxy.injected


@pytest.mark.parametrize(
    ("fault", "meets", "server_saw_it"),
    [
        ("unavailable", None, False),
        ("reset", ConnectionResetError, False),
        ("drop", ConnectionResetError, True),
        ("truncate", http.client.IncompleteRead, True),
        ("stall", TimeoutError, True),
    ],
)
def test_each_fault_happens_once_and_the_next_request_passes(server, fault, meets, server_saw_it):
    with proxy_with(server, fault) as proxy:
        if meets is None:
            status, body = ask(proxy, "PUT", BODY)
            assert status == 503
            assert b"<Code>SlowDown</Code>" in body
        else:
            with pytest.raises(meets):
                ask(proxy, "PUT", BODY)
        assert len(server.seen) == server_saw_it
        assert ask(proxy, "PUT", BODY) == (200, BODY)
        assert proxy.injected == {(fault, "PUT", "/a/b?c"): 1}
    assert fault in KINDS


def test_an_answer_without_a_body_is_cut_in_its_head(server):
    with (
        proxy_with(server, "truncate") as proxy,
        socket.create_connection(("127.0.0.1", proxy.port)) as client,
    ):
        client.sendall(b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n")
        came = b"".join(iter(lambda: client.recv(100), b""))
    assert came.startswith(b"HTTP/1.1 200")
    assert b"\r\n\r\n" not in came


def test_a_truncated_body_ends_after_half_of_it(server):
    with proxy_with(server, "truncate") as proxy, pytest.raises(http.client.IncompleteRead) as cut:
        ask(proxy)
    assert cut.value.partial == BODY[: len(BODY) // 2]


def test_requests_are_counted_by_method_and_target(server):
    asked = []
    with FaultProxy(server.server_port, lambda *request: asked.append(request)) as proxy:
        for method in ("GET", "PUT", "GET"):
            ask(proxy, method)
    assert asked == [("GET", "/a/b?c", 0), ("PUT", "/a/b?c", 0), ("GET", "/a/b?c", 1)]


def test_a_client_that_expects_100_continue_gets_it(server):
    with proxy_with(server, None) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert server.seen == [("PUT", "/x", b"abc")]
