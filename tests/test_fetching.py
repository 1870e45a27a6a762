"""Downloads: which addresses may be asked, and servers that mean harm."""

import gzip
import http.server
import io
import ipaddress
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sam4mllm_tool.errors import AccessDenied, ImageError, InputError
from sam4mllm_tool.images.addresses import is_public
from sam4mllm_tool.images.fetching import fetch
from sam4mllm_tool.images.loading import ImagePolicy, load_image

PIXELS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 13


def picture_file() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(source, policy=None) -> list:
    return load_image(source, policy).image.array.tolist()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Host"]))
        if self.path == "/a.png":
            self.respond(200, picture_file())
        elif self.path.startswith("/to/"):
            self.respond(302, b"", Location=self.path[4:])
        elif self.path == "/slow":
            self.respond(200, b"", **{"Content-Length": "1000000"})
            while not self.server.stopped.wait(0.02):
                self.wfile.write(b"x")
        elif self.path == "/endless":
            self.respond(200, b"x" * 100_000, **{"Content-Length": "100000000"})
        else:
            self.respond(404, b"")

    def respond(self, status, body, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests, running.stopped, running.daemon_threads = [], threading.Event(), True
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.stopped.set()
        running.shutdown()
        thread.join()


PRIVATE = ImagePolicy(allow_network=True, allow_private_network=True)


def test_network_is_off_by_default_and_private_addresses_stay_refused(server):
    port = server.server_port
    for policy in (ImagePolicy(), ImagePolicy(allow_private_network=True)):
        with pytest.raises(AccessDenied, match="off"):
            load_image(f"http://127.0.0.1:{port}/a.png", policy)
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "0.0.0.0"):
        with pytest.raises(AccessDenied, match="private"):
            load_image(f"http://{host}:{port}/a.png", ImagePolicy(allow_network=True))
    assert server.requests == []


def test_a_public_server_may_not_redirect_to_a_private_one(server, monkeypatch):
    """The first address passes as public; the one it redirects to is checked again."""
    port = server.server_port
    checked = []

    def first_is_public(address):
        checked.append(address)
        return len(checked) == 1

    monkeypatch.setattr("sam4mllm_tool.images.fetching.is_public", first_is_public)
    with pytest.raises(AccessDenied, match="private"):
        fetch(
            f"http://127.0.0.1:{port}/to/http://127.0.0.1:{port}/a.png",
            ImagePolicy(allow_network=True),
        )
    assert [path for path, _ in server.requests] == [f"/to/http://127.0.0.1:{port}/a.png"]


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    answers = [(0, 0, 0, "", ("8.8.8.8", 80)), (0, 0, 0, "", ("127.0.0.1", 80))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: answers)
    with pytest.raises(AccessDenied, match="private"):
        fetch("http://both.example/a.png", ImagePolicy(allow_network=True))


def test_download(server):
    base = f"http://localhost:{server.server_port}"
    assert pixels(f"{base}/a.png", PRIVATE) == PIXELS.tolist()
    assert pixels(f"{base}/to//a.png", PRIVATE) == PIXELS.tolist()
    # The connection is made to the checked address, the server still sees the name.
    assert {host for _, host in server.requests} == {f"localhost:{server.server_port}"}


@pytest.mark.parametrize(
    ("path", "policy"),
    [
        ("/missing", PRIVATE),
        ("/to/" * 9 + "/a.png", PRIVATE),
        ("/endless", ImagePolicy(None, None, True, True, max_bytes=50_000)),
        ("/slow", ImagePolicy(None, None, True, True, timeout_seconds=0.2)),
    ],
)
def test_bad_downloads(server, path, policy):
    with pytest.raises(ImageError) as caught:
        load_image(f"http://127.0.0.1:{server.server_port}{path}", policy)
    assert caught.value.hint


@pytest.mark.parametrize(
    "url", ["ftp://example.com/a.png", "file://host/a.png", "http://", "http://[", "gopher://x"]
)
def test_other_schemes(url):
    with pytest.raises(InputError) as caught:
        load_image(url, PRIVATE)
    assert caught.value.hint


def test_redirect_to_a_file_url_is_refused(server):
    with pytest.raises(AccessDenied):
        load_image(f"http://127.0.0.1:{server.server_port}/to/file:///etc/passwd", PRIVATE)


def test_unreachable_host_is_retryable():
    with pytest.raises(ImageError) as caught:
        load_image("http://127.0.0.1:9/a.png", PRIVATE)
    assert caught.value.retryable


# -- servers that mean harm ----------------------------------------------------------------------


@contextmanager
def answering(answer, note=lambda request: None):
    """A server that lets ``answer(connection, stopped)`` talk to each that connects."""
    stopped = threading.Event()

    def talk(connection: socket.socket) -> None:
        with connection:
            try:
                note(connection.recv(65_536))
                answer(connection, stopped)
            except OSError:
                pass

    def accept() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            stopped.set()
            thread.join()


def drip(connection, stopped, head: bytes, piece: bytes) -> None:
    connection.sendall(head)
    while not stopped.wait(0.02):
        connection.sendall(piece)


DRIPS = {
    "silence": (b"", b""),
    "status line": (b"HTTP/1.1 2", b"0"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
    "early hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "redirects": (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 9\r\n", b"X: y\r\n"),
}


@pytest.mark.parametrize("head, piece", DRIPS.values(), ids=DRIPS)
def test_the_deadline_covers_every_part_of_an_answer(head, piece):
    policy = ImagePolicy(None, None, True, True, timeout_seconds=0.3)
    with answering(lambda *talk: drip(*talk, head, piece)) as address:
        begun = time.monotonic()
        with pytest.raises(ImageError, match=r"longer than 0\.3 s|Could not") as caught:
            fetch(address, policy)
        assert time.monotonic() - begun < 1.5
    assert caught.value.retryable


def test_the_deadline_covers_the_resolver(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: time.sleep(2) or [])
    begun = time.monotonic()
    with pytest.raises(ImageError, match="longer than"):
        fetch("http://slow.example/", ImagePolicy(allow_network=True, timeout_seconds=0.2))
    assert time.monotonic() - begun < 1


def test_compressed_transfer_is_refused():
    packed = gzip.compress(bytes(20_000_000))
    asked = []

    def answer(connection, stopped):
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(packed) + packed)

    with (
        answering(answer, asked.append) as address,
        pytest.raises(ImageError, match="compressed transfer"),
    ):
        fetch(address, PRIVATE)
    assert b"accept-encoding: identity" in asked[0].lower()


ANSWERS = [
    b"",
    b"\0" * 100,
    b"HTTP/9.9 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe/\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://xn--/\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://a:99999/\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: \r\n\r\n",
    b"HTTP/1.1 302 Found\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: javascript:alert(1)\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
]


@pytest.mark.parametrize("reply", ANSWERS, ids=lambda reply: ascii(reply[:60]))
def test_a_malformed_answer_is_a_typed_error(reply):
    with (
        answering(lambda connection, stopped: connection.sendall(reply)) as address,
        pytest.raises(InputError) as caught,
    ):
        load_image(address, ImagePolicy(None, None, True, True, timeout_seconds=2))
    assert caught.value.hint


WILD = st.text(
    st.sampled_from("ab.-:/@?#%[]\\ \0\t\n\u3002\uff0e\u200dßİé中\ud800\U0001f600")
    | st.characters(),
    max_size=30,
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(WILD)
@example("xn--")
@example("xn--a\u0378")
@example("a" * 70 + ".com")
@example("127.0.0.1/\ud800")
@example("127.0.0.1:99999")
@example("127.0.0.1:0")
@example("user:pass@127.0.0.1:9")
@example("[fe80::1%25lo]/")
@example("[::ffff:127.0.0.1]/")
def test_a_malformed_url_is_a_typed_error(rest):
    """Nothing listens anywhere: the resolver knows no name but addresses."""
    for scheme in ("http://", "https://", "HTTP:", "file://"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("socket.getaddrinfo", _only_addresses)
            with pytest.raises(InputError) as caught:
                load_image(scheme + rest, ImagePolicy((), None, allow_network=True))
        assert caught.value.hint


_resolve = socket.getaddrinfo


def _only_addresses(host, port, **options):
    return _resolve(host, port, flags=socket.AI_NUMERICHOST, **options)


def test_the_address_that_was_checked_is_the_one_connected_to(server, monkeypatch):
    """A name that leads elsewhere the second time it is asked for is asked for once."""
    asked, checked = [], []

    def rebinding(host, port, *rest, **options):
        if host != "rebinding.example":
            return _resolve(host, port, *rest, **options)
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr("socket.getaddrinfo", rebinding)
    monkeypatch.setattr(
        "sam4mllm_tool.images.fetching.is_public", lambda one: checked.append(one) or True
    )
    port = server.server_port
    fetch(f"http://rebinding.example:{port}/a.png", ImagePolicy(allow_network=True))
    assert (asked, checked) == (["rebinding.example"], ["127.0.0.1"])
    # The server listens on 127.0.0.1 only and is asked by the name.
    assert server.requests == [("/a.png", f"rebinding.example:{port}")]


# -- addresses -----------------------------------------------------------------------------------

# Every entry of the IANA special-purpose address registries (October 2025), and the other blocks
# of RFC 4291 that no public host has.
REGISTRY_BLOCKS = """
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12
192.0.0.0/24 192.0.0.0/29 192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32
192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24
198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 255.255.255.255/32 224.0.0.0/4
::1/128 ::/128 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23
2001::/32 2001:1::1/128 2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48
2001:10::/28 2001:20::/28 2001:30::/28 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20
5f00::/16 fc00::/7 fe80::/10 ::/96 fec0::/10 ff00::/8
"""


@pytest.mark.parametrize("network", REGISTRY_BLOCKS.split())
def test_no_address_of_a_special_range_is_asked(network):
    block = ipaddress.ip_network(network)
    middle = block[block.num_addresses // 2]
    assert not any(is_public(str(one)) for one in (block[0], middle, block[-1]))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "223.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0",
     "172.15.255.255", "172.32.0.0", "169.253.255.255", "192.0.1.0", "198.17.255.255",
     "198.20.0.0", "2001:200::1", "2001:4860:4860::8888", "2001:db7:ffff::1", "2001:db9::",
     "2003::1", "2606:4700::1111", "2a00::1", "3ffe:ffff::1", "::ffff:8.8.8.8"],
)  # fmt: skip
def test_the_neighbours_of_special_ranges_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("address", ["::ffff:127.0.0.1", "::ffff:169.254.169.254", "fe80::1"])
def test_ipv4_inside_ipv6_is_judged_as_ipv4(address):
    assert not is_public(address)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.ip_addresses())
def test_the_standard_library_calls_no_refused_address_global(address):
    """Python's own tables hold fewer ranges, so this goes one way."""
    if not address.is_global or address.is_multicast:
        assert not is_public(str(address))
