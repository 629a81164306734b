"""Whom the server answers: who asks for it by a name that is its own.

A page of a stranger can point a domain name of its own at this computer and then read what the
server answers (DNS rebinding). The browser says in the Host header which name it believes to talk
to, and in Origin whose page asks; numbers of addresses cannot be pointed elsewhere.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from captum_attn._checks import listed, shown
from captum_attn.errors import OptionError

__all__ = ["KnownHosts", "checked_hosts", "is_known"]

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
REFUSED = b"This server answers to its own address alone; see hosts= of serve."


class KnownHosts:
    """Passes on what is asked of a known host, by no other page; all else gets 403.

    Args:
        app (ASGI application): what answers.
        hosts (collection of str): names that are known beside those of this computer.
        everywhere (bool): whether other computers ask, by any of its addresses.
    """

    def __init__(self, app: Any, hosts: Sequence[str] = (), everywhere: bool = False) -> None:
        self.app, self.everywhere = app, everywhere
        own = {socket.gethostname().lower(), socket.getfqdn().lower()} if everywhere else set()
        self.hosts = LOCAL | own | {host.lower() for host in hosts}

    async def __call__(
        self, scope: Mapping[str, Any], receive: Callable, send: Callable[[dict], Awaitable[None]]
    ) -> None:
        if scope["type"] not in ("http", "websocket") or self._known(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSED})

    def _known(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        hosts = [value.decode("latin-1") for name, value in headers if name.lower() == b"host"]
        pages = [value.decode("latin-1") for name, value in headers if name.lower() == b"origin"]
        return len(hosts) == 1 and all(
            is_known(name, self.hosts, self.everywhere)
            for name in (f"//{hosts[0]}", *pages)
        )  # fmt: skip


def is_known(address: str, hosts: frozenset[str] | set[str], everywhere: bool = False) -> bool:
    """Whether an address, ``//name:port``, is of a known host.

    Args:
        address (str): of a Host header behind two slashes, or an Origin header.
        hosts (set of str): the names.
        everywhere (bool): whether any number of an address will do.

    Examples::

        >>> is_known("//127.0.0.1:7860", LOCAL), is_known("https://evil.example", LOCAL)
        (True, False)
    """
    try:
        found = urlsplit(address)
        name, _ = found.hostname, found.port
    except ValueError:
        return False
    if name is None or "@" in found.netloc or found.path.strip("/"):
        return False
    if name in hosts:
        return True
    try:
        number = ip_address(name)
    except ValueError:
        return False
    return everywhere or number.is_loopback


def checked_hosts(hosts: Any) -> list[str]:
    """Names of hosts, without scheme and port."""
    found = listed("hosts", hosts, "names")
    for name in found:
        if not isinstance(name, str) or not name.strip() or set("/:@ ") & set(name):
            raise OptionError(
                f"hosts: expected names such as 'my.proxy.org', without scheme and port, got "
                f"{shown(name)}"
            )
    return found
