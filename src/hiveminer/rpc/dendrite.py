"""The client side of synapses: sends signed requests and accepts only signed answers.

An answer is read within a cap and a deadline. A call is retried only if the request was
never sent, or if sending it twice has the same effect as once, and always with a fresh
signature: the same one would be refused as a replay.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Self, TypeVar

import httpx
from bittensor import http_auth

from hiveminer.errors import MinerError
from hiveminer.protocol import InvalidBody, IsAlive, Synapse, clean
from hiveminer.rpc.signatures import own_hotkey, verify_answer

S = TypeVar("S", bound=Synapse)

PROBE_SECONDS = 3.0
MAX_RETRY_AFTER_SECONDS = 3600.0

HEADERS = {
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "User-Agent": "hiveminer",
}
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True)
class Endpoint:
    """Where a neuron serves its axon; `hotkey` is its ss58 address."""

    hotkey: str
    ip: str
    port: int

    @property
    def url(self) -> str:
        """Raises `MinerError` for an address that cannot be called."""
        try:
            address = ipaddress.ip_address(self.ip)
        except ValueError:
            raise MinerError(self.hotkey, "its address is not an IP address") from None
        odd = address.is_unspecified or address.is_multicast or address.is_link_local
        if odd or not 0 < self.port < 65536:
            raise MinerError(self.hotkey, "it serves no axon")
        host = f"[{address}]" if address.version == 6 else str(address)
        return f"http://{host}:{self.port}"


def endpoints_of(neurons: Iterable[Any]) -> list[Endpoint]:
    """The endpoints of the neurons of a metagraph that serve an axon."""
    found = []
    for neuron in neurons:
        if neuron.axon:
            ip, _, port = neuron.axon.rpartition(":")
            found.append(Endpoint(hotkey=neuron.hotkey, ip=ip.strip("[]"), port=int(port)))
    return found


class Dendrite:
    """Calls synapses of other neurons, over one pool of connections; an async context manager.

    retries: further attempts of one call, the first after about `retry_seconds`.
    """

    def __init__(
        self,
        wallet: Any,
        *,
        retries: int = 2,
        retry_seconds: float = 0.2,
        connect_seconds: float = 5.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.hotkey = own_hotkey(wallet)
        # A wallet would read its files again for each signature (2 ms).
        self._key = wallet.hotkey
        self.retries = retries
        self._retry_seconds = retry_seconds
        self._http = httpx.AsyncClient(
            transport=transport,
            # A proxy named in the environment would see and could change every call.
            trust_env=False,
            follow_redirects=False,
            # Idle connections are closed before the axon closes them, so that a call is not
            # sent on one that is just being closed.
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=256, keepalive_expiry=10.0
            ),
            timeout=httpx.Timeout(None, connect=connect_seconds),
            cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
            headers=HEADERS,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def call(self, endpoint: Endpoint, synapse: S, *, timeout_seconds: float) -> S:
        """Send `synapse` and return the neuron's signed answer.

        `timeout_seconds` covers everything: connecting, waiting in the neuron's queue,
        retries. Raises `MinerError` for whatever is caused by that neuron or the network,
        `ValueError` if the synapse is larger than its own cap.
        """
        body = synapse.model_dump_json().encode()
        if len(body) > synapse.max_request_bytes:
            raise ValueError(f"{synapse.name()} is larger than {synapse.max_request_bytes} bytes")
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._attempts(endpoint, synapse, body)
        except TimeoutError:
            reason = f"no answer within {timeout_seconds:g} s"
            raise MinerError(endpoint.hotkey, reason) from None

    async def _attempts(self, endpoint: Endpoint, synapse: S, body: bytes) -> S:
        # Whether it may be repeated although it may have arrived.
        is_idempotent = isinstance(synapse, IsAlive) or bool(getattr(synapse, "request_id", ""))
        for attempt in range(self.retries + 1):
            try:
                return await self._attempt(endpoint, synapse, body)
            except httpx.HTTPError as error:
                again = isinstance(error, NEVER_SENT) or is_idempotent
                if not again or attempt == self.retries:
                    raise MinerError(endpoint.hotkey, _reason(error)) from error
            await asyncio.sleep(self._retry_seconds * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, endpoint: Endpoint, synapse: S, body: bytes) -> S:
        target = f"/{synapse.name()}"
        signed = http_auth.sign(
            self._key, method="POST", path=target, body=body, receiver_ss58=endpoint.hotkey
        )
        url, cap, answer = endpoint.url + target, synapse.max_response_bytes, bytearray()
        async with self._http.stream("POST", url, content=body, headers=signed) as response:
            # As sent: nothing is decompressed, so nothing can expand.
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > cap:
                    raise MinerError(endpoint.hotkey, f"its answer is larger than {cap} bytes")
        if response.status_code != 200:
            raise _refused(endpoint.hotkey, response, answer)
        try:
            signer = verify_answer(
                response.headers,
                bytes(answer),
                target=target,
                nonce=signed[http_auth.HEADER_NONCE],
                status=response.status_code,
                receiver=self.hotkey,
            )
        except http_auth.AuthError as error:
            reason = f"its answer's signature: {clean(str(error))}"
            raise MinerError(endpoint.hotkey, reason) from None
        if signer != endpoint.hotkey:
            raise MinerError(endpoint.hotkey, "its answer is signed by another hotkey")
        return _parse(endpoint.hotkey, synapse, bytes(answer))


async def probe(wallet: Any, endpoints: Sequence[Endpoint]) -> dict[str, IsAlive | str]:
    """By hotkey: what each of these axons answers to `IsAlive`, or why it does not."""
    answers: dict[str, IsAlive | str] = {}
    if not endpoints:
        return answers
    async with Dendrite(wallet, retries=0, connect_seconds=PROBE_SECONDS) as dendrite:

        async def one(endpoint: Endpoint) -> None:
            try:
                answers[endpoint.hotkey] = await dendrite.call(
                    endpoint, IsAlive(), timeout_seconds=PROBE_SECONDS
                )
            except MinerError as error:
                answers[endpoint.hotkey] = error.reason

        await asyncio.gather(*map(one, endpoints))
    return answers


def _parse(hotkey: str, synapse: S, answer: bytes) -> S:
    try:
        parsed = type(synapse).from_json(answer)
    except InvalidBody as error:
        raise MinerError(hotkey, f"its answer does not fit: {error}", status=200) from None
    if getattr(parsed, "request_id", None) != getattr(synapse, "request_id", None):
        raise MinerError(hotkey, "it answered another request", status=200)
    return parsed


def _refused(hotkey: str, response: httpx.Response, answer: bytearray) -> MinerError:
    try:
        parsed = json.loads(answer)
        detail = parsed.get("detail") if isinstance(parsed, dict) else None
    # RecursionError: deeply nested brackets within the cap.
    except (ValueError, RecursionError):
        detail = None
    reason = detail if isinstance(detail, str) and detail else f"HTTP {response.status_code}"
    after = response.headers.get("retry-after", "")
    is_number = after.isascii() and after.isdigit() and len(after) < 10
    return MinerError(
        hotkey,
        clean(reason),
        status=response.status_code,
        retry_after_seconds=min(float(after), MAX_RETRY_AFTER_SECONDS) if is_number else None,
    )


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no connection in time"
    return clean(str(error) or type(error).__name__)
