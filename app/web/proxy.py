"""What a reverse proxy in front says: where a request comes from, and who has signed in there. Plain ASGI."""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

PEER = "peer"


class Proxied:
    """Believe X-Forwarded-* of trusted proxies alone, and keep the address that really connected."""

    def __init__(self, app: ASGIApp, trusted: str) -> None:
        self.app = ProxyHeadersMiddleware(app, trusted)  # pyright: ignore[reportArgumentType] - the same ASGI, typed twice

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})[PEER] = (scope.get("client") or ("",))[0]
        await self.app(scope, receive, send)  # pyright: ignore[reportArgumentType]


def trusted(peer: str, proxies: str) -> bool:
    """Tell whether an address is one of the trusted ones; `*` trusts nobody with saying who somebody is."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    return any(address in network for network in networks(proxies))


def networks(proxies: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Return what a list of addresses and networks with commas names, without what it cannot name."""
    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for part in proxies.split(","):
        try:
            found.append(ipaddress.ip_network(part.strip(), strict=False))
        except ValueError:
            continue
    return found
