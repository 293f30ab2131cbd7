"""Files of other web servers, fetched without being led to places that a server must not ask.

Every address that a name stands for is looked at before the connection, and the connection goes to just that address.
No redirects, no proxies, bounded sizes and waits. Cloud metadata and other link-local addresses are never asked;
private ones and this machine only where SAE_ATLAS_REMOTE_NETWORKS names them.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from app.errors import BadInput, Forbidden, NotFound, TooLarge, Unavailable
from app.settings import Settings

WAIT_SECONDS = 20.0
"""For a connection, and for each piece of an answer."""
_BLOCK = 2**20
_SLOWEST = 50_000
"""Bytes a second below which a file is given up: an answer that trickles must not hold a trainer for ever."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Addresses behind which an IPv4 address stands."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def text(settings: Settings, url: str, max_bytes: int) -> bytes:
    """Return a small file whole. Raises as `save` does."""
    return b"".join(_blocks(settings, url, max_bytes))


def save(settings: Settings, url: str, target: Path, max_bytes: int) -> int:
    """Write a file of another server to disk and return its size.

    Raises Forbidden for an address that is not asked, NotFound, TooLarge, and Unavailable when no answer comes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    with target.open("wb") as out:
        for block in _blocks(settings, url, max_bytes):
            done += out.write(block)
    return done


def check_url(url: str) -> str:
    """Return a URL that can be asked at all. Raises BadInput: other schemes, credentials, odd characters."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = None, 0
    good = parts is not None and parts.scheme in ("http", "https") and parts.hostname and port != 0
    if not good or parts is None or parts.username or parts.query or parts.fragment or not url.isascii():
        raise BadInput(f"{url[:200]!r} is no http or https address of a folder, without name, password or question.")
    if any(ord(c) <= 32 for c in url):
        raise BadInput(f"{url[:200]!r} holds spaces or control characters.")
    return url.rstrip("/")


def _blocks(settings: Settings, url: str, max_bytes: int) -> Iterator[bytes]:
    with _answer(settings, url) as answer:
        if answer.status in (404, 410):
            raise NotFound(f"There is no {url[:300]}.")
        if answer.status != 200:
            led = f" to {answer.headers['location'][:200]!r}; give that address" if "location" in answer.headers else ""
            raise Unavailable(f"{url[:300]} answers {answer.status}{led}.")
        said = answer.headers.get("content-length", "")
        if said.isdigit() and int(said) > max_bytes:
            raise TooLarge(f"{url[:300]} is {int(said):,} bytes; up to {max_bytes:,} are fetched.")
        done, began = 0, time.monotonic()
        while block := answer.read(_BLOCK):
            done += len(block)
            if done > max_bytes:
                raise TooLarge(f"{url[:300]} is more than {max_bytes:,} bytes.")
            if time.monotonic() - began > WAIT_SECONDS + done / _SLOWEST:
                raise Unavailable(f"{url[:300]} comes too slowly: {done:,} bytes in {WAIT_SECONDS:g} s and more.")
            yield block
        if said.isdigit() and done != int(said):
            raise Unavailable(f"{url[:300]} broke off after {done:,} of {int(said):,} bytes.")


@contextmanager
def _answer(settings: Settings, url: str) -> Generator[http.client.HTTPResponse]:
    parts = urlsplit(check_url(url))
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = http.client.HTTPConnection(host, port, timeout=WAIT_SECONDS)
    try:
        connection.sock = socket.create_connection((str(_address(settings, host, port)), port), WAIT_SECONDS)
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        headers = {
            "host": parts.netloc,
            "accept-encoding": "identity",
            "user-agent": "sae-atlas",
            "connection": "close",
        }
        connection.request("GET", parts.path or "/", headers=headers)
        yield connection.getresponse()
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        raise Unavailable(f"{parts.scheme}://{parts.netloc[:200]} does not answer: {str(error)[:200]}.") from None
    finally:
        connection.close()


def _address(settings: Settings, host: str, port: int) -> Address:
    """Return the address that is asked: the first of a name all of whose addresses may be."""
    found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    addresses = [ipaddress.ip_address(str(one).partition("%")[0]) for one in sorted(map(str, found))]
    for address in addresses:
        check_address(settings, host, address)
    return addresses[0]


def check_address(settings: Settings, host: str, address: Address) -> None:
    """Raise Forbidden for an address that a server must not be made to ask."""
    plain = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    if plain in _NAT64:
        plain = ipaddress.IPv4Address(int(plain) & 2**32 - 1)
    never = plain.is_link_local or plain.is_multicast or plain.is_unspecified
    named = any(plain in network for network in _networks(settings))
    if never or not (plain.is_global or named):
        rule = "is never asked" if never else "is private; SAE_ATLAS_REMOTE_NETWORKS must name its network"
        raise Forbidden(f"{host[:200]} stands for {plain}, which {rule}.")


def _networks(settings: Settings) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    parts = [part.strip() for part in settings.remote_networks.split(",") if part.strip()]
    try:
        return [ipaddress.ip_network(part, strict=False) for part in parts]
    except ValueError as error:
        raise BadInput(f"SAE_ATLAS_REMOTE_NETWORKS: {error}.") from None
