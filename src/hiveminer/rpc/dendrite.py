"""Call other neurons, signed, and believe only signed answers.

What both ends agree on about signatures stands here too, since the axon checks with the
same functions: requests are `btauth/1` (`bittensor.http_auth`); an answer is signed with
the same call, under a method and a path that no request can have, so that nothing an
axon signs can be passed on as a request of its hotkey, and with the request's nonce and
the status in the path, so that an old answer or another status does not fit.

An answer is read within a cap and a deadline. A call is tried again only where nothing
can have happened yet, or where the synapse says that twice is as good as once, and
always under a fresh signature: the same one again would be refused as a replay.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import ipaddress
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Self, TypeVar

import bittensor
import httpx
from bittensor import http_auth
from pydantic import ValidationError

from hiveminer.errors import MinerError, OperatorError
from hiveminer.protocol import IsAlive, Synapse

S = TypeVar("S", bound=Synapse)

MAX_AGE_SECONDS = http_auth.DEFAULT_MAX_AGE
ALLOWED_SKEW_SECONDS = http_auth.DEFAULT_ALLOWED_SKEW

MAX_HOTKEY = 64
"""Characters of an ss58 address. Reading base58 takes time by the square of its length, and
it is read before anything is proved."""

ANSWER_METHOD = "ANSWER"
ANSWER_SKEW_SECONDS = 60.0
"""An answer is bound to our own nonce, so its clock only has to be roughly right."""

MAX_REASON = 300
"""Characters of another's reason that are passed on."""

CONNECT_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.2
MAX_RETRY_AFTER_SECONDS = 3600.0

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


# Signatures, as both ends see them


def answer_path(target: str, nonce: str, status: int) -> str:
    """The path under which the answer to a request is signed.

    `target` is the request's path and query as sent, `nonce` its nonce header.
    """
    return f"{target}#{nonce}#{status}"


def verify_signed(
    headers: Mapping[str, str],
    body: bytes,
    *,
    method: str,
    path: str,
    receiver: str,
    nonce_store: http_auth.NonceStore,
    max_age_seconds: float = MAX_AGE_SECONDS,
    allowed_skew_seconds: float = ALLOWED_SKEW_SECONDS,
) -> http_auth.Caller:
    """The one door to `http_auth.verify`. Raises `http_auth.AuthError`.

    Only sr25519 is accepted, by our own choice and not by a header: later versions of
    the SDK ask for that choice as `expected_crypto_type`, earlier ones do not know it.
    """
    given = {name.lower(): value for name, value in headers.items()}
    if given.get(http_auth.HEADER_CRYPTO.lower(), "sr25519") != "sr25519":
        raise http_auth.MalformedAuth("only sr25519 hotkeys are accepted")
    if len(given.get(http_auth.HEADER_HOTKEY.lower(), "")) > MAX_HOTKEY:
        raise http_auth.MalformedAuth("no hotkey is that long")
    options: dict[str, Any] = {}
    if _takes_crypto_type(http_auth.verify):
        options["expected_crypto_type"] = bittensor.CRYPTO_SR25519
    return http_auth.verify(
        headers,
        body,
        method=method,
        path=path,
        self_hotkey_ss58=receiver,
        max_age=max_age_seconds,
        allowed_skew=allowed_skew_seconds,
        nonce_store=nonce_store,
        **options,
    )


@functools.lru_cache(maxsize=4)
def _takes_crypto_type(verify: Callable[..., Any]) -> bool:
    return "expected_crypto_type" in inspect.signature(verify).parameters


def own_hotkey(wallet: Any) -> str:
    """The ss58 address that this wallet signs with. Raises `OperatorError`."""
    hotkey = wallet.hotkey
    if getattr(hotkey, "crypto_type", bittensor.CRYPTO_SR25519) != bittensor.CRYPTO_SR25519:
        raise OperatorError("the hotkey is not sr25519: make one with `btcli wallet new-hotkey`")
    return str(hotkey.ss58_address)


class _BoundAnswers:
    """A nonce store that remembers nothing: an answer to an old request fits no new one."""

    def check_and_store(self, hotkey_ss58: str, nonce_ns: int) -> bool:
        return True


# Calls


@dataclass(frozen=True)
class Endpoint:
    """Where a neuron is to be found: `hotkey` is its ss58 address."""

    hotkey: str
    ip: str
    port: int

    @property
    def url(self) -> str:
        """The root of its axon. Raises `MinerError` if nobody can be there."""
        try:
            address = ipaddress.ip_address(self.ip)
        except ValueError:
            raise MinerError(self.hotkey, "its address is no IP address") from None
        odd = address.is_unspecified or address.is_multicast or address.is_link_local
        if odd or not 0 < self.port < 65536:
            raise MinerError(self.hotkey, "it serves no axon")
        host = f"[{address}]" if address.version == 6 else str(address)
        return f"http://{host}:{self.port}"


def endpoint_of(neuron: Any) -> Endpoint | None:
    """Where a neuron of the metagraph serves its axon; None if it does not."""
    if not neuron.axon:
        return None
    ip, _, port = neuron.axon.rpartition(":")
    return Endpoint(hotkey=neuron.hotkey, ip=ip.strip("[]"), port=int(port))


class Dendrite:
    """Calls synapses at other neurons, over one pool of connections.

    Use it as an async context manager, in one event loop. `concurrency` bounds
    `broadcast`, `retries` the further attempts of one call; `answer_cap` (bytes) lowers
    the synapse's own cap on an answer.
    """

    def __init__(
        self,
        wallet: Any,
        *,
        concurrency: int = 256,
        retries: int = 2,
        connect_seconds: float = CONNECT_SECONDS,
        answer_cap: int | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.wallet = wallet
        self.hotkey = own_hotkey(wallet)
        # By the key itself: by a wallet, each signature reads its files again (2 ms).
        self._key = wallet.hotkey
        self.retries = retries
        self._answer_cap = answer_cap
        self._turns = asyncio.Semaphore(concurrency)
        self._http = httpx.AsyncClient(
            transport=transport,
            # A proxy named in the environment would see and could change every call.
            trust_env=False,
            follow_redirects=False,
            # Idle connections are given up before an axon gives them up, so that a call
            # does not meet one that is just being closed.
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=concurrency, keepalive_expiry=10.0
            ),
            timeout=httpx.Timeout(None, connect=connect_seconds),
            cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
            headers={"Accept-Encoding": "identity", "User-Agent": "hiveminer"},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def call(self, endpoint: Endpoint, synapse: S, *, timeout_seconds: float) -> S:
        """Send `synapse` and return the neuron's signed answer.

        `timeout_seconds` is for everything: connecting, waiting in the neuron's queue,
        retries. Raises `MinerError` for whatever is that neuron's or the way's fault,
        `ValueError` if the synapse is larger than its own cap.
        """
        url = f"{endpoint.url}/{synapse.name()}"
        body = synapse.model_dump_json().encode()
        if len(body) > synapse.max_request_bytes:
            raise ValueError(f"{synapse.name()} is larger than {synapse.max_request_bytes} bytes")
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._attempts(endpoint, synapse, url, body)
        except TimeoutError:
            reason = f"no answer within {timeout_seconds:g} s"
            raise MinerError(endpoint.hotkey, reason) from None

    async def broadcast(
        self,
        endpoints: Sequence[Endpoint],
        synapse: S | Callable[[Endpoint], S],
        *,
        timeout_seconds: float,
    ) -> list[S | MinerError]:
        """Call every endpoint at once; answers and errors stand in the endpoints' order.

        `synapse` is one for all, or makes one for each. Each call has `timeout_seconds`
        from when its turn comes.
        """

        async def one(endpoint: Endpoint) -> S | MinerError:
            async with self._turns:
                try:
                    mine = synapse if isinstance(synapse, Synapse) else synapse(endpoint)
                    return await self.call(endpoint, mine, timeout_seconds=timeout_seconds)
                except MinerError as error:
                    return error

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(endpoint)) for endpoint in endpoints]
        return [task.result() for task in tasks]

    async def _attempts(self, endpoint: Endpoint, synapse: S, url: str, body: bytes) -> S:
        for attempt in range(self.retries + 1):
            try:
                return await self._attempt(endpoint, synapse, url, body)
            except httpx.HTTPError as error:
                again = isinstance(error, NEVER_SENT) or _twice_is_once(synapse)
                if not again or attempt == self.retries:
                    raise MinerError(endpoint.hotkey, _plain(error)) from error
            await asyncio.sleep(FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, endpoint: Endpoint, synapse: S, url: str, body: bytes) -> S:
        request = self._http.build_request("POST", url, content=body)
        target = request.url.raw_path.decode("ascii")
        signed = http_auth.sign(
            self._key,
            method="POST",
            path=target,
            body=body,
            receiver_ss58=endpoint.hotkey,
        )
        request.headers.update(signed)
        request.headers["Content-Type"] = "application/json"
        response = await self._http.send(request, stream=True)
        try:
            answer = await self._read(endpoint, synapse, response)
        finally:
            await response.aclose()
        if response.status_code != 200:
            raise _refused(endpoint.hotkey, response, answer)
        bound = answer_path(target, signed[http_auth.HEADER_NONCE], response.status_code)
        self._check(endpoint.hotkey, response, answer, bound)
        return _parse(endpoint.hotkey, synapse, answer)

    async def _read(self, endpoint: Endpoint, synapse: S, response: httpx.Response) -> bytes:
        """The body as sent: nothing is unpacked, so nothing can blow up."""
        cap = min(synapse.max_response_bytes, self._answer_cap or synapse.max_response_bytes)
        answer = bytearray()
        async for chunk in response.aiter_raw():
            answer += chunk
            if len(answer) > cap:
                raise MinerError(endpoint.hotkey, f"its answer is larger than {cap} bytes")
        return bytes(answer)

    def _check(self, hotkey: str, response: httpx.Response, answer: bytes, bound: str) -> None:
        try:
            signer = verify_signed(
                response.headers,
                answer,
                method=ANSWER_METHOD,
                path=bound,
                receiver=self.hotkey,
                nonce_store=_BoundAnswers(),
                max_age_seconds=ANSWER_SKEW_SECONDS,
                allowed_skew_seconds=ANSWER_SKEW_SECONDS,
            )
        except http_auth.AuthError as error:
            raise MinerError(hotkey, f"its answer's signature: {clean(str(error))}") from None
        if signer.hotkey_ss58 != hotkey:
            raise MinerError(hotkey, "its answer is signed by another hotkey")


def _twice_is_once(synapse: Synapse) -> bool:
    """Whether a call may be repeated although it may have arrived."""
    return isinstance(synapse, IsAlive) or bool(getattr(synapse, "request_id", ""))


def _parse(hotkey: str, synapse: S, answer: bytes) -> S:
    try:
        parsed = type(synapse).model_validate_json(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        reason = f"its answer does not fit: {clean(where)}: {clean(first['msg'])}"
        raise MinerError(hotkey, reason, status=200) from None
    if getattr(parsed, "request_id", None) != getattr(synapse, "request_id", None):
        raise MinerError(hotkey, "it answered another request", status=200)
    return parsed


def _refused(hotkey: str, response: httpx.Response, answer: bytes) -> MinerError:
    try:
        said = json.loads(answer)
        detail = said.get("detail") if isinstance(said, dict) else None
    # RecursionError: a deep pile of brackets within the cap.
    except (ValueError, RecursionError):
        detail = None
    reason = detail if isinstance(detail, str) and detail else f"HTTP {response.status_code}"
    return MinerError(
        hotkey,
        clean(reason),
        status=response.status_code,
        retry_after_seconds=_retry_after(response.headers.get("retry-after", "")),
    )


def _retry_after(text: str) -> float | None:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        return None
    return min(float(text), MAX_RETRY_AFTER_SECONDS)


def _plain(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no connection in time"
    return clean(str(error) or type(error).__name__)


def clean(text: str) -> str:
    """Another's words, made safe for a terminal and a log: one line, no control characters."""
    printable = "".join(mark if mark.isprintable() else " " for mark in text[: 2 * MAX_REASON])
    short = " ".join(printable.split())
    return short if len(short) <= MAX_REASON else short[: MAX_REASON - 1] + "…"
