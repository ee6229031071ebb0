"""Signatures of requests and answers: what the axon and the dendrite agree on.

Requests are `btauth/1` (`bittensor.http_auth`). An answer is signed with the same call,
under a method and a path that no request can have, so that nothing an axon signs can be
passed on as a request of its hotkey. The path contains the request's nonce and the
status, so that an old answer or another status does not verify.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bittensor
from bittensor import http_auth

from hiveminer.errors import OperatorError

MAX_HOTKEY = 64
"""Characters of an ss58 address. Decoding base58 takes time quadratic in its length, and it
is decoded before anything is proved."""

MAX_NONCE = 20
"""Digits of a nonce in nanoseconds."""

ANSWER_METHOD = "ANSWER"
ANSWER_SKEW_SECONDS = 60.0
"""An answer is bound to our own nonce, so its clock only has to be roughly right."""


def own_hotkey(wallet: Any) -> str:
    """The ss58 address that this wallet signs with. Raises `OperatorError`."""
    hotkey = wallet.hotkey
    if getattr(hotkey, "crypto_type", bittensor.CRYPTO_SR25519) != bittensor.CRYPTO_SR25519:
        raise OperatorError("the hotkey is not sr25519: make one with `btcli wallet new-hotkey`")
    return str(hotkey.ss58_address)


def check_size(hotkey: str, nonce: str) -> None:
    """Refuse credentials that are expensive to parse. Raises `http_auth.MalformedAuth`."""
    if len(hotkey) > MAX_HOTKEY:
        raise http_auth.MalformedAuth("no hotkey is that long")
    if len(nonce) > MAX_NONCE:
        raise http_auth.MalformedAuth("no nonce is that long")


def answer_path(target: str, nonce: str, status: int) -> str:
    """The path under which the answer to a request is signed.

    `target` is the request's path and query as sent, `nonce` its nonce header.
    """
    return f"{target}#{nonce}#{status}"


def sign_answer(
    key: Any, body: bytes, *, target: str, nonce: str, status: int, receiver: str
) -> dict[str, str]:
    """Headers that prove that `key` answered this request with this status and body."""
    path = answer_path(target, nonce, status)
    return http_auth.sign(key, method=ANSWER_METHOD, path=path, body=body, receiver_ss58=receiver)


def verify_answer(
    headers: Mapping[str, str], body: bytes, *, target: str, nonce: str, status: int, receiver: str
) -> str:
    """The hotkey that signed this answer to our request. Raises `http_auth.AuthError`."""
    caller = verify_signed(
        headers,
        body,
        method=ANSWER_METHOD,
        path=answer_path(target, nonce, status),
        receiver=receiver,
        nonce_store=_AnyNonce(),
        max_age_seconds=ANSWER_SKEW_SECONDS,
        allowed_skew_seconds=ANSWER_SKEW_SECONDS,
    )
    return caller.hotkey_ss58


def verify_signed(
    headers: Mapping[str, str],
    body: bytes,
    *,
    method: str,
    path: str,
    receiver: str,
    nonce_store: http_auth.NonceStore,
    max_age_seconds: float = http_auth.DEFAULT_MAX_AGE,
    allowed_skew_seconds: float = http_auth.DEFAULT_ALLOWED_SKEW,
) -> http_auth.Caller:
    """The only place that calls `http_auth.verify`. Raises `http_auth.AuthError`, also for keys
    other than sr25519."""
    given = {name.lower(): value for name, value in headers.items()}
    if given.get(http_auth.HEADER_CRYPTO.lower(), "sr25519") != "sr25519":
        raise http_auth.MalformedAuth("only sr25519 hotkeys are accepted")
    hotkey, nonce = (
        given.get(name.lower(), "") for name in (http_auth.HEADER_HOTKEY, http_auth.HEADER_NONCE)
    )
    check_size(hotkey, nonce)
    return http_auth.verify(
        headers,
        body,
        method=method,
        path=path,
        self_hotkey_ss58=receiver,
        max_age=max_age_seconds,
        allowed_skew=allowed_skew_seconds,
        nonce_store=nonce_store,
    )


class _AnyNonce:
    """Remembers nothing: an answer to an old request does not fit a new one."""

    def check_and_store(self, hotkey_ss58: str, nonce_ns: int) -> bool:
        return True
