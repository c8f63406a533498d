"""Remote pictures: only from hosts that the operator named, wherever a redirect points."""

import asyncio
import base64
import re
import threading
import tracemalloc
from contextlib import suppress

import pytest

from minigpt4.errors import UserError
from minigpt4.web.guard import image_url
from minigpt4.web.guard.image_url import ImageUrls, TooLarge
from tests.api_case import data_url, picture_file
from tests.http_case import Handler, listening

PICTURE = picture_file()


class Host(Handler):
    """/picture.png, /large, /slow, /missing, /gzip and other codings; /to?URL redirects."""

    def do_GET(self):  # noqa: N802 - the library's name
        self.server.asked.append(self.path)
        path, _, target = self.path.partition("?")
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        self.send_response(404 if path == "/missing" else 200)
        if path in ("/gzip", "/Identity", "/aws-chunked"):
            self.send_header("Content-Encoding", path[1:])
        self.end_headers()
        with suppress(OSError):
            if path == "/slow":
                self.server.ended.wait(5)
            for _ in range(300 if path == "/large" else 1):
                self.wfile.write(PICTURE if path != "/large" else b"\0" * 10_000)


@pytest.fixture
def host():
    with listening(Host) as server:
        server.asked, server.ended = [], threading.Event()
        server.name = f"127.0.0.1:{server.server_port}"
        yield server
        server.ended.set()


def read(urls: ImageUrls, url: str) -> bytes:
    return asyncio.run(urls.read(url))


def test_data_urls():
    assert read(ImageUrls(), data_url(PICTURE)) == PICTURE
    spaced = data_url(PICTURE).replace("data:image/png", "DATA:image/png;name=a.png")
    assert read(ImageUrls(), spaced[:50] + "\n" + spaced[50:]) == PICTURE
    spaced = data_url(PICTURE).replace(";base64", "; base64 ")
    assert read(ImageUrls(), f" {spaced}\n") == PICTURE
    with pytest.raises(TooLarge):
        read(ImageUrls(max_bytes=10), data_url(PICTURE))


def test_a_picture_with_a_blank_after_each_pair_of_letters():
    """Nobody waits for it, and it takes its own size a few times over, not a string for each."""
    urls, order = ImageUrls(), []
    url = "data:image/png;base64," + "AAAA\n" * 200_000

    async def decode():
        assert await urls.read(url) == bytes(600_000)
        order.append("decoded")

    async def other():
        order.append("other")

    async def both():
        await asyncio.gather(decode(), other())

    tracemalloc.start()
    asyncio.run(both())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order == ["other", "decoded"]
    assert most < 5 * len(url)


@pytest.mark.parametrize("sent", ["with pluses", "wrapped", "indented", "broken once"])
def test_spaces_in_base64(sent):
    """A form turns "+" into spaces; other ones are breaks."""
    content = base64.b64decode("ab+/c++9" * 30)
    data = base64.b64encode(content).decode()
    data = {
        "with pluses": data.replace("+", " "),
        "wrapped": " ".join(data[i : i + 76] for i in range(0, len(data), 76)),
        "indented": "\n    ".join(data[i : i + 76] for i in range(0, len(data), 76)),
        "broken once": f"{data[:50]} {data[50:]}",
    }[sent]
    assert read(ImageUrls(), "data:image/png;base64," + data) == content


@pytest.mark.parametrize("data", ["AAAAA", "A\u00e4AA", "AA\ud83dA", "A=AA", "AA<A", "%zzAA"])
def test_damaged_base64(data):
    with pytest.raises(UserError, match="base64 is damaged"):
        read(ImageUrls(), "data:image/png;base64," + data)


@pytest.mark.parametrize(
    ("data", "character"),
    [("data:image/png;base64,AAAA", ":"), ("b'AAAA'", "'"), ("[object Object]", "[")],
)
def test_what_is_no_base64_is_named(data, character):
    with pytest.raises(UserError, match=re.escape(f"has a “{character}” in it: ")):
        read(ImageUrls(), "data:image/png;base64," + data)


def test_a_named_host(host):
    assert read(ImageUrls([host.name]), host.url + "/picture.png") == PICTURE
    assert read(ImageUrls(["127.0.0.1"]), f" {host.url}/picture.png\n") == PICTURE
    with pytest.raises(UserError, match="host compresses it"):
        read(ImageUrls([host.name]), host.url + "/gzip")
    for coding in ("Identity", "aws-chunked"):
        assert read(ImageUrls([host.name]), f"{host.url}/{coding}") == PICTURE
    assert read(ImageUrls([host.name]), f"{host.url}/to?/picture.png") == PICTURE


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("EXAMPLE.org", "example.org"),
        ("example.org:80", "example.org:80"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("[::1]:8080", "::1:8080"),
        ("xn--mller-kva.example", "müller.example"),
    ],
)
def test_a_host_is_read_in_one_form(given, host):
    assert ImageUrls([f" {given} "]).hosts == {host}


@pytest.mark.parametrize(
    "host", ["https://a.org/path", "*", "*.a.org", "a.org/x", "a b", "a:b", "x@a"]
)
def test_hosts_that_no_address_has(host):
    with pytest.raises(UserError, match="which is not a host"):
        ImageUrls([host])


@pytest.mark.parametrize("hosts", [[], ["example.org"], ["127.0.0.1:1"], ["0.0.1"], [""]])
def test_another_host_is_never_asked(host, hosts):
    for url in (
        host.url + "/picture.png",
        f"http://example.org@{host.name}/picture.png",
        f"http://example.org\\@{host.name}/picture.png",
        f"http://example.org#@{host.name}/picture.png",
        f"HTTP://{host.name}/picture.png",
        f"http://[::ffff:127.0.0.1]:{host.server_port}/picture.png",
    ):
        if "example.org" in hosts and "#" in url:
            continue  # that is a request to example.org
        with pytest.raises(UserError):
            read(ImageUrls(hosts), url)
    assert host.asked == []


@pytest.mark.parametrize(
    "url", ["", "ftp://a/b", "file:///etc/passwd", "//a/b", "http://", "http://a:b/", "http://\0"]
)
def test_what_is_no_address(url):
    with pytest.raises(UserError):
        read(ImageUrls(["a"]), url)


@pytest.mark.trust("Protocol", "addresses of other machines, redirects, `file:`")
def test_a_redirect_to_another_host_is_not_followed(host):
    for target in (f"http://localhost:{host.server_port}/picture.png", "file:///etc/passwd"):
        with pytest.raises(UserError):
            read(ImageUrls([host.name]), f"{host.url}/to?{target}")
    assert [path[:3] for path in host.asked] == ["/to"] * 2
    with pytest.raises(UserError, match="too often"):
        read(ImageUrls([host.name]), f"{host.url}/to?/to?/to?/to?/to?/picture.png")


def test_limits(host, monkeypatch):
    monkeypatch.setattr(image_url, "SECONDS", 0.3)
    with pytest.raises(TooLarge):
        read(ImageUrls([host.name], 100_000), host.url + "/large")
    with pytest.raises(UserError, match="could not be fetched"):
        read(ImageUrls([host.name]), host.url + "/slow")
    with pytest.raises(UserError, match="404"):
        read(ImageUrls([host.name]), host.url + "/missing")
    with pytest.raises(UserError, match="could not be fetched"):
        read(ImageUrls(["127.0.0.1"]), "http://127.0.0.1:1/")
