"""A message's image_url -> the picture's bytes: any `data:` URL, the web only from named hosts."""

import asyncio
import base64
import functools
import re
import ssl
import string
from collections.abc import Collection
from urllib.parse import unquote_to_bytes

import httpx
from starlette.concurrency import run_in_threadpool

from minigpt4.errors import UserError

SECONDS = 15  # to fetch one picture
REDIRECTS = 3
MEGABYTE = 2**20
BLANKS = string.whitespace.encode()
STANDARD = bytes.maketrans(b"-_", b"+/")  # base64's alphabet for URLs -> the standard one
COMPRESSED = {"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"}
BARE = re.compile("/9j/|iVBORw0KGgo|R0lGOD|UklGR")  # how pictures begin in base64
ALIEN = re.compile(r"(?![\w+/=%<>-])[!-~]")  # such as from a second “data:”, or Python's b'…'


class TooLarge(UserError):
    """More bytes than are allowed."""


class ImageUrls:
    """Reads the pictures that messages name.

    hosts: where pictures may be fetched from, as "example.org" (any port) or "example.org:8443";
    max_bytes: the largest picture file. UserError for what is not a host.
    """

    def __init__(self, hosts: Collection[str] = (), max_bytes: int = 20 * MEGABYTE) -> None:
        self.hosts = frozenset(_host(host.strip()) for host in hosts if host.strip())
        self.max_bytes = max_bytes

    async def read(self, url: str) -> bytes:
        """The picture file's bytes. UserError if it is refused or not available."""
        url = url.strip()
        if url[:5].lower() == "data:":
            return await run_in_threadpool(self._decode, url)
        if BARE.match(url):
            raise UserError("The picture is base64 alone: put “data:image/jpeg;base64,” before it.")
        return await self._fetch(url)

    def _decode(self, url: str) -> bytes:
        head, comma, data = url[5:].partition(",")
        if not comma or not "".join(head[-20:].lower().split()).endswith(";base64"):
            raise UserError("A data: URL must read data:image/…;base64,… to be a picture.")
        if len(data) > self.max_bytes * 11 // 8 + 4096:  # line breaks included
            raise self._too_large()
        try:
            # Some clients break base64 into lines. `split` could make millions of strings.
            plain = data.encode("ascii")
            plain = unquote_to_bytes(plain) if b"%" in plain else plain
            plain = _with_plus(plain.strip()).translate(STANDARD, BLANKS).rstrip(b"=")
            content = base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
        except ValueError:
            alien = ALIEN.search(data)
            what = "is damaged: encode the file again."
            if alien:
                what = f"has a “{alien[0]}” in it: send what the file is encoded to, alone."
            raise UserError(f"The picture's base64 {what}") from None
        if len(content) > self.max_bytes:
            raise self._too_large()
        return content

    async def _fetch(self, url: str) -> bytes:
        """Download the picture; follow redirects to allowed hosts only."""
        tls = await run_in_threadpool(_tls)
        try:
            async with (
                asyncio.timeout(SECONDS),
                # trust_env: a stranger must not use the operator's proxies or passwords.
                httpx.AsyncClient(verify=tls, trust_env=False, follow_redirects=False) as client,
            ):
                address = httpx.URL(url)
                for _ in range(REDIRECTS + 1):
                    self._check(address)
                    # Uncompressed: a small compressed answer could unpack to gigabytes.
                    plain = {"Accept-Encoding": "identity"}
                    async with client.stream("GET", address, headers=plain) as response:
                        if not response.has_redirect_location:
                            return await self._body(response)
                        address = address.join(response.headers["location"])
        except (httpx.InvalidURL, UnicodeError):
            raise UserError("The image_url cannot be read: check its spelling.") from None
        except (TimeoutError, httpx.HTTPError, OSError):
            raise UserError(
                "The picture could not be fetched: check its address, or send a data: URL."
            ) from None
        raise UserError("The picture's address redirects too often: send a data: URL.")

    async def _body(self, response: httpx.Response) -> bytes:
        if response.status_code != 200:
            raise UserError(
                "The picture could not be fetched: check its address, for which the host answered "
                f"{response.status_code}."
            )
        coded = re.split(r"[\s,]+", response.headers.get("content-encoding", "").lower())
        if not COMPRESSED.isdisjoint(coded):  # other codings (S3's aws-chunked) are harmless
            raise UserError("The picture's host compresses it unasked: send a data: URL.")
        content = bytearray()
        async for chunk in response.aiter_raw(65536):
            content += chunk
            if len(content) > self.max_bytes:
                raise self._too_large()
        return bytes(content)

    def _check(self, address: httpx.URL) -> None:
        """UserError unless the address is allowed. httpx asks exactly the URL checked here."""
        if address.scheme not in ("http", "https"):
            raise UserError("An image_url must begin with data:, http:// or https://.")
        if not self.hosts:
            raise UserError(
                "This server fetches no pictures from the web: send them as data: URLs."
            )
        port = address.port or {"http": 80, "https": 443}[address.scheme]
        names = {address.host.lower(), f"{address.host.lower()}:{port}"}
        if address.userinfo or not names & self.hosts:
            raise UserError(
                "This server fetches no pictures from that host: send it as a data: URL."
            )

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The picture's file is larger than {self.max_bytes / MEGABYTE:g} MB: scale it down."
        )


def _with_plus(plain: bytes) -> bytes:
    """Base64 with each space turned back into the "+" that it was before a form was decoded. Spaces
    at equal distances stay: they stand for line breaks."""
    spaces = plain.count(b" ")
    others = len(plain) - spaces > len(plain.translate(None, BLANKS))
    if not spaces or others or len(plain) % 4:
        return plain
    first = plain.index(b" ")
    wrapped = plain[first :: first + 1] == b" " * spaces
    return plain if wrapped else plain.replace(b" ", b"+")


def _host(text: str) -> str:
    """A host as `_check` compares it."""
    bare_ipv6 = text.count(":") > 1 and "[" not in text
    try:
        address = httpx.URL(f"//[{text}]" if bare_ipv6 else f"//{text}")
        if re.search(r"[/\s?#@*]", text) or not address.host:
            raise httpx.InvalidURL(text)
    except httpx.InvalidURL:
        raise UserError(
            f"--image-hosts names “{text}”, which is not a host: give each in full, such as "
            "example.org or example.org:8443."
        ) from None
    name = address.host.lower()
    return name if address.port is None else f"{name}:{address.port}"


@functools.cache
def _tls() -> ssl.SSLContext:
    """The TLS settings, made once and in a thread: this reads every certificate authority."""
    return httpx.create_ssl_context(trust_env=False)
