"""Addresses and ports: what this machine listens on, and where others reach it.

A machine behind a router does not know its public address. Two services on the internet are
asked, and are believed only if they agree; otherwise the operator has to give it.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from hiveminer.errors import OperatorError

SERVICES = ("https://api.ipify.org", "https://checkip.amazonaws.com")
"""Each answers a GET with the caller's address."""

EVERY_ADDRESS = ("0.0.0.0", "::")
"""Wildcards: they can be listened on, but not called."""


def check(ip: str) -> str:
    """Why this address may be hard to reach over the internet; "" if nothing speaks against it.

    Raises ValueError with the reason if it cannot be published at all.
    """
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        raise ValueError(f"{ip} is an IPv4-mapped IPv6 address: write {address.ipv4_mapped}")
    if address.is_unspecified:
        raise ValueError(f"{ip} means every address of this machine; it cannot be called")
    if address.is_loopback:
        raise ValueError(f"{ip} is a loopback address: the chain refuses it as an axon's")
    if address.is_multicast or address.is_link_local or ip == "255.255.255.255":
        raise ValueError(f"{ip} is not a single host's address")
    if not address.is_global:
        return f"{ip} is a private address: the internet cannot reach it"
    if address.version == 6:
        return f"{ip} is IPv6: neurons without IPv6 cannot reach it"
    return ""


def ask_outside(*, services: Sequence[str] = SERVICES, timeout_seconds: float = 5.0) -> str:
    """This machine's public address, as all services report it within `timeout_seconds`.

    Raises OperatorError when a service does not answer, or two disagree.
    """
    with ThreadPoolExecutor(len(services)) as pool:
        answers = list(pool.map(lambda url: _ask(url, timeout_seconds), services))
    found = {answer for answer in answers if answer is not None}
    if None in answers or len(found) != 1:
        said = ", ".join(
            f"{url} said {answer or 'nothing'}"
            for url, answer in zip(services, answers, strict=True)
        )
        raise OperatorError(
            f"this machine's public address is not known ({said}); give it with --axon.external_ip"
        )
    return found.pop()


def _ask(url: str, timeout_seconds: float) -> str | None:
    """One service's answer, if it is an address."""
    deadline = time.monotonic() + timeout_seconds
    body = b""
    try:
        # A proxy from the environment would get its own address.
        with (
            httpx.Client(timeout=timeout_seconds, trust_env=False) as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != 200:
                return None
            for chunk in response.iter_bytes(64):
                body += chunk
                if len(body) > 256 or time.monotonic() > deadline:
                    return None
        return str(ipaddress.ip_address(body.decode("ascii").strip()))
    except (httpx.HTTPError, ValueError):  # ValueError: no address, or not ASCII
        return None


def ports_to_try(first: int, *, free: bool) -> range:
    """The port; if `free`, also the 63 after it, unless it is 0."""
    return range(first, min(first + (64 if free and first else 1), 65536))


def port_is_free(ip: str, port: int) -> bool:
    """Whether this TCP port can be listened on now."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError:
            return False
    return True
