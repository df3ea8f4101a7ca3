"""A real S3 protocol server on loopback, and a proxy before it that is slow, throttles and drops connections.

moto answers S3's requests from memory. The proxy forwards them, counts them, and does what its `faults` say.
"""

import contextlib
import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = {
    "503": b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    "404": b"<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>",
    "403": b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
}
HTML = b"<!DOCTYPE html><html><body>Please sign in to the network.</body></html>"
BUCKET = "bucket"


class Faults:
    """What the proxy does to the n-th request (from 1): kind(n, method, path) -> None or one of

    "503"    throttled, not forwarded
    "403"    refused
    "drop"   the connection closes, not forwarded
    "lost"   forwarded, and the connection closes without the answer
    "torn"   forwarded, and the connection closes within the answer's body
    "short"  forwarded, and the answer is whole but lacks its last half
    "flip"   forwarded, and a bit of the answer is another
    "html"   a page of a proxy in between, with status 200
    "404"    not forwarded
    """

    def __init__(self) -> None:
        self.kind: Callable[[int, str, str], str | None] = lambda n, method, path: None  # noqa: ARG005
        self.latency_s = 0.0
        self.requests: list[tuple[str, str]] = []
        self.under_way = self.most = 0
        """Requests at the same time: now, and at most so far."""
        self.done: list[str] = []

    def lists(self) -> int:
        """How many requests listed the bucket."""
        return sum(is_list(*request) for request in self.requests)


def is_list(method: str, path: str) -> bool:
    """Whether a request lists the bucket."""
    return method == "GET" and ("list-type" in path or path.rstrip("/") == f"/{BUCKET}")


class _Handler(BaseHTTPRequestHandler):
    """Forwards to `port`, with the faults."""

    faults: Faults
    port: int
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.faults.requests.append((self.command, self.path))
        fault = self.faults.kind(len(self.faults.requests), self.command, self.path)
        if fault:
            self.faults.done.append(fault)
        self.faults.under_way += 1
        self.faults.most = max(self.faults.most, self.faults.under_way)
        time.sleep(self.faults.latency_s)
        self.faults.under_way -= 1
        if fault in ANSWERS:
            self.answer(int(fault), [("Content-Type", "application/xml")], ANSWERS[fault])
            return
        if fault == "drop":
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        reply = upstream.getresponse()
        data = reply.read()
        upstream.close()
        if fault == "lost":
            self.close_connection = True
            return
        if fault in ("short", "flip", "html"):
            middle = len(data) // 2
            changed = data[:middle] + bytes(one ^ 1 for one in data[middle : middle + 1]) + data[middle + 1 :]
            data = {"short": data[:middle], "flip": changed, "html": HTML}[fault]
            headers = [(k, v) for k, v in reply.getheaders() if k.lower() not in ("content-length", "content-range")]
            self.answer(200, headers, data)
            return
        self.answer(reply.status, reply.getheaders(), data, torn=fault == "torn")

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, torn: bool = False) -> None:
        self.send_response_only(status)
        named = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if "content-length" not in named:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if torn else data)
        if torn:
            self.wfile.flush()
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, str, Faults]]:
    """(address of the proxy, of moto itself, the proxy's faults), with a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    direct = f"http://127.0.0.1:{port}"
    boto3.client("s3", endpoint_url=direct).create_bucket(Bucket=BUCKET)
    try:
        with proxied(direct) as (address, faults):
            yield address, direct, faults
    finally:
        server.stop()


@contextlib.contextmanager
def proxied(server: str) -> Iterator[tuple[str, Faults]]:
    """A proxy before the server at this address: (its own address, its faults)."""
    faults = Faults()
    handler = type("Handler", (_Handler,), {"faults": faults, "port": int(server.rpartition(":")[2])})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}", faults
    finally:
        proxy.shutdown()
        proxy.server_close()


ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
