"""Checks a peer's multiaddress, and names the part that is wrong."""

from __future__ import annotations

import functools
import ipaddress
import re

EXAMPLE = "such as /ip4/192.0.2.1/tcp/8009/p2p/12D3Koo..."
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def checked_peer(text: str) -> str:
    """Return the address. Raises ValueError that names the wrong part."""
    head, found, peer_id = text.rpartition("/p2p/")
    if not found:
        raise ValueError(f"must end with /p2p/ and the peer's id ({EXAMPLE})")
    _check_host(*head.split("/")[:3])
    match head.split("/")[3:]:
        case ["tcp", port] | ["udp", port, "quic-v1"]:
            if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
                raise ValueError(f"{port[:20]!r} is not a port from 1 to 65535")
        case rest:
            transport = "/".join(["", *rest])[:40] or "nothing"
            raise ValueError(
                f"/tcp/PORT or /udp/PORT/quic-v1 must follow the host, not {transport}"
            )
    if not _is_peer_id(peer_id):
        raise ValueError(f"{peer_id[:60]!r} is not a peer id")
    return text


def _check_host(start: str = "", kind: str = "", host: str = "") -> None:
    if start or kind not in ("ip4", "ip6", "dns", "dns4", "dns6"):
        raise ValueError(f"must begin with /ip4/, /ip6/ or /dns4/ and a host ({EXAMPLE})")
    if kind.startswith("dns"):
        if not re.fullmatch(r"(?!-)[A-Za-z0-9.-]{1,253}", host):
            raise ValueError(f"{host[:60]!r} is not a host name")
        return
    try:
        right = ipaddress.ip_address(host).version == int(kind[-1])
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"{host[:60]!r} is not an IPv{kind[-1]} address (a name: /dns4/NAME)")


def _is_peer_id(text: str) -> bool:
    """Base58 of a multihash: a code, the length of the rest, and the rest."""
    if not re.fullmatch(r"[1-9A-HJ-NP-Za-km-z]{2,128}", text):
        return False
    number = functools.reduce(lambda sum_, mark: sum_ * 58 + BASE58.index(mark), text, 0)
    zeros = len(text) - len(text.lstrip("1"))
    data = bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
    return len(data) > 2 and data[1] == len(data) - 2
