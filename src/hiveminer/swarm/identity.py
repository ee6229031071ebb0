"""Peer identities: a hotkey vouches for a libp2p key, and every DHT message proves it.

A peer's id follows from an RSA key. The neuron's hotkey signs that key into a token; each request
and response of the DHT carries the token and is signed with the key, and a token is valid only
while its hotkey is registered. So a peer id stands for one hotkey, and a hotkey for one peer id.
Hivemind's other handlers, which know a caller's peer id from libp2p, ask `identify` for the
hotkey. It costs about 1 ms per message each way.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittensor import CRYPTO_SR25519
from bittensor.keyfiles import Keypair
from hivemind.p2p import PeerID
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils.auth import AuthRole, AuthRPCWrapper, TokenAuthorizerBase
from hivemind.utils.timed_storage import get_dht_time

from hiveminer.errors import OperatorError, SwarmError
from hiveminer.runtime.events import tell
from hiveminer.swarm.keys import MAX_PUBLIC_KEY, load_or_make, peer_id_of_key

logger = logging.getLogger(__name__)

LIFETIME_SECONDS = 600.0
"""A token's lifetime; it is renewed after half of it."""

SKEW_SECONDS = 60.0
"""Clocks may differ by this much; Hivemind refuses older requests."""

DOMAIN = b"hiveminer peer token 1\n"
"""Prefix of what a hotkey signs. With the key it is longer than 256 bytes, so it can never be a
transaction's payload: of a long one the hash is signed."""

USERNAME = re.compile(r"([!-~]{1,64}) ([!-~]{1,128})")
"""Of a token: the hotkey and the run id. It may be logged."""

MAX_TIME = 20
MAX_NONCE = 32
MAX_PEER_ID = 64

REMEMBERED_TOKENS = 1024
"""Verified tokens are remembered; the least recently used is dropped."""

ASKED_AT_ONCE = 64
"""Unknown peers to identify at the same time; more are refused."""

ASKED_AGAIN_SECONDS = 1.0
"""A peer that did not identify itself is not asked again before this."""

TOLD_AGAIN_SECONDS = 60.0


class Identity:
    """A hotkey, the RSA key that it vouches for, and its run.

    hotkey_keypair: the neuron's sr25519 hotkey; a `Keypair`, or anything that signs like one.
    key_path: the RSA key's file, in Hivemind's format; created if missing. Raises OperatorError
        when the file is invalid or cannot be read or created.
    """

    def __init__(self, hotkey_keypair: Any, *, run_id: str, key_path: Path):
        if getattr(hotkey_keypair, "crypto_type", CRYPTO_SR25519) != CRYPTO_SR25519:
            raise OperatorError(
                "the hotkey is not sr25519: make one with `btcli wallet new-hotkey`"
            )
        self._keypair = hotkey_keypair
        self.hotkey = str(hotkey_keypair.ss58_address)
        self.run_id = run_id
        self.key_path = key_path
        self.private_key = load_or_make(key_path)
        self.public_key: bytes = self.private_key.get_public_key().to_bytes()
        self.peer_id = str(peer_id_of_key(self.public_key))

    def endorse(self, *, expires: float) -> Any:
        """A token that is valid until `expires` (seconds since 1970)."""
        token = AccessToken(
            username=f"{self.hotkey} {self.run_id}",
            public_key=self.public_key,
            expiration_time=f"{expires:.3f}",
        )
        token.signature = self._keypair.sign(_statement(token))
        return token


@dataclass(frozen=True)
class Proof:
    """The content of a verified token; expires: seconds since 1970."""

    hotkey: str
    run_id: str
    peer_id: str
    expires: float

    def contradicts(self, other: Proof) -> bool:
        """Whether one hotkey would have two peer ids, or one peer id two hotkeys."""
        return (self.hotkey == other.hotkey) != (self.peer_id == other.peer_id)


def is_signed(token: Any, hotkey: str) -> bool:
    """Whether the hotkey has signed this token."""
    try:
        key = Keypair(ss58_address=hotkey, crypto_type=CRYPTO_SR25519)
        return bool(key.verify(_statement(token), token.signature))
    except ValueError:
        return False


class Authorizer(TokenAuthorizerBase):  # type: ignore[misc]
    """Accepts DHT messages of registered hotkeys in our run, and remembers who is who.

    It lives in the DHT's process. Of two tokens that contradict each other the one that expires
    later is valid; the other's peer loses its access.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        admitted: Collection[str] = (),
        clock: Callable[[], float] = get_dht_time,
        is_signed: Callable[[Any, str], bool] = is_signed,
    ):
        super().__init__(identity.private_key)
        self.identity = identity
        self._clock = clock
        self._is_signed = is_signed
        self.admitted = frozenset(admitted)
        self._proofs: OrderedDict[bytes, Proof] = OrderedDict()
        self._by_hotkey: dict[str, Proof] = {}
        self._by_peer: dict[str, Proof] = {}
        self._tell_again_at: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[Any]] = {}
        self._ask_again_at: dict[str, float] = {}

    def admit(self, hotkeys: Collection[str]) -> None:
        """Admit these hotkeys, and no others."""
        self.admitted = frozenset(hotkeys)
        for hotkey in self._by_hotkey.keys() - self.admitted:
            self._by_peer.pop(self._by_hotkey.pop(hotkey).peer_id, None)
        for raw, proof in list(self._proofs.items()):
            if proof.hotkey not in self.admitted:
                del self._proofs[raw]
        for hotkey in self._tell_again_at.keys() - self.admitted:
            del self._tell_again_at[hotkey]
        self._ask_again_at.clear()

    def hotkey_of(self, peer_id: str) -> str | None:
        """The admitted hotkey that this peer id has proved, or None."""
        if peer_id == self.identity.peer_id:
            return self.identity.hotkey if self.identity.hotkey in self.admitted else None
        proof = self._by_peer.get(peer_id)
        return proof.hotkey if proof is not None and proof.expires > self._clock() else None

    def proved(self) -> dict[str, str]:
        """The admitted hotkeys of other peers, by the peer id that they have proved."""
        now = self._clock()
        return {name: each.hotkey for name, each in self._by_peer.items() if each.expires > now}

    async def identify(
        self, peer_id: str, *, ask: Callable[[Any], Awaitable[Any]], timeout_seconds: float
    ) -> str | None:
        """As `hotkey_of`, but an unknown peer is asked: `ask` pings a PeerID."""
        known = self.hotkey_of(peer_id)
        if known is not None or peer_id == self.identity.peer_id:
            return known
        task = self._asking.get(peer_id) or self._begin_asking(peer_id, ask)
        if task is not None:
            # Not wait_for, which would cancel the task for all others who wait for it.
            await asyncio.wait({task}, timeout=timeout_seconds)
        return self.hotkey_of(peer_id)

    def _begin_asking(
        self, peer_id: str, ask: Callable[[Any], Awaitable[Any]]
    ) -> asyncio.Task[Any] | None:
        now = time.monotonic()
        if now < self._ask_again_at.get(peer_id, 0.0) or len(self._asking) >= ASKED_AT_ONCE:
            return None
        if not 0 < len(peer_id) <= MAX_PEER_ID:  # decoding base58 takes quadratic time
            return None
        try:
            name = PeerID.from_base58(peer_id)
        except ValueError:
            return None
        if len(self._ask_again_at) >= REMEMBERED_TOKENS:
            self._ask_again_at.clear()
        self._ask_again_at[peer_id] = now + ASKED_AGAIN_SECONDS
        task = self._asking[peer_id] = asyncio.ensure_future(ask(name))
        task.add_done_callback(lambda done: self._end_asking(peer_id, done))
        return task

    def _end_asking(self, peer_id: str, task: asyncio.Task[Any]) -> None:
        self._asking.pop(peer_id, None)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("asking %s who it is failed: %r", peer_id, task.exception())

    def refusal(self, token: Any) -> str | None:
        """Why the bearer of this token is refused, or None. Cheapest check first."""
        claim = _claim(token)
        if claim is None:
            return "no token of ours"
        hotkey, run_id, expires = claim
        if hotkey not in self.admitted:
            return f"hotkey {hotkey} is not registered"
        proof = self._prove(token, hotkey=hotkey, run_id=run_id, expires=expires)
        if proof is None:
            return f"the token is not signed by {hotkey} for an RSA key"
        if run_id != self.identity.run_id:
            if self._may_tell(hotkey):
                told = f"peer {proof.peer_id} of hotkey {hotkey} is refused: it is in run {run_id}"
                tell(logger, "other_run", f"{told}, we are in {self.identity.run_id}")
            return f"it is in run {run_id}"
        left = expires - self._clock()
        if not 0 < left <= LIFETIME_SECONDS + SKEW_SECONDS:
            return f"the token counts for {left:.0f} s"
        for known in (self._by_hotkey.get(hotkey), self._by_peer.get(proof.peer_id)):
            if known is not None and known.contradicts(proof) and known.expires >= expires:
                return f"{known.hotkey} has a newer token, with peer id {known.peer_id}"
        return None

    # What hivemind calls.

    async def get_token(self) -> Any:
        return self.identity.endorse(expires=self._clock() + LIFETIME_SECONDS)

    def does_token_need_refreshing(self, access_token: Any) -> bool:
        left = float(access_token.expiration_time) - self._clock()
        # Longer than any token lives: the clock was set back.
        return not LIFETIME_SECONDS / 2 < left < LIFETIME_SECONDS + SKEW_SECONDS / 2

    def is_token_valid(self, access_token: Any) -> bool:
        # Hivemind asserts that our own token is valid. Nobody else can use it: the message must
        # be signed with our key.
        if access_token == self._local_access_token:
            return True
        reason = self.refusal(access_token)
        if reason is not None:
            logger.debug("a DHT message is refused: %s", reason)
        return reason is None

    async def validate_request(self, request: Any) -> bool:
        auth = request.auth
        # NaN is neither too old nor too new.
        if not 0 < len(auth.nonce) <= MAX_NONCE or not math.isfinite(auth.time):
            return False
        if not await super().validate_request(request):
            self._tell_clock(auth)
            return False
        self._remember(auth.client_access_token)
        return True

    async def validate_response(self, response: Any, request: Any) -> bool:
        if not await super().validate_response(response, request):
            return False
        self._remember(response.auth.service_access_token)
        return True

    def _prove(self, token: Any, *, hotkey: str, run_id: str, expires: float) -> Proof | None:
        """The token's content, if its signature is valid."""
        raw = token.SerializeToString()
        proof = self._proofs.get(raw)
        if proof is None:
            peer_id = peer_id_of_key(token.public_key)
            if peer_id is None or not self._is_signed(token, hotkey):
                return None
            proof = self._proofs[raw] = Proof(hotkey, run_id, peer_id, expires)
            if len(self._proofs) > REMEMBERED_TOKENS:
                self._proofs.popitem(last=False)
        self._proofs.move_to_end(raw)
        return proof

    def _remember(self, token: Any) -> None:
        """Bind hotkey and peer id, once the message's signature by the token's key is verified:
        otherwise a hotkey could claim the peer id of another."""
        proof = self._proofs.get(token.SerializeToString())
        if proof is None:  # our own
            return
        for known in (self._by_hotkey.get(proof.hotkey), self._by_peer.get(proof.peer_id)):
            if known is not None:
                if known.contradicts(proof):
                    logger.info("hotkey %s now has peer id %s", proof.hotkey, proof.peer_id)
                elif known.expires >= proof.expires:
                    return
                self._by_hotkey.pop(known.hotkey, None)
                self._by_peer.pop(known.peer_id, None)
        self._by_hotkey[proof.hotkey] = self._by_peer[proof.peer_id] = proof

    def _tell_clock(self, auth: Any) -> None:
        """Report that a registered peer is refused because of its clock."""
        proof = self._proofs.get(auth.client_access_token.SerializeToString())
        ahead = auth.time - self._clock()
        if proof is not None and abs(ahead) > SKEW_SECONDS and self._may_tell(proof.hotkey):
            logger.warning(
                "a peer of hotkey %s is refused: its clock is %.0f s %s ours; set both by NTP",
                proof.hotkey, abs(ahead), "ahead of" if ahead > 0 else "behind",
            )  # fmt: skip

    def _may_tell(self, hotkey: str) -> bool:
        """Whether nothing was reported about this hotkey recently; only for admitted ones, so that
        the memory is bounded."""
        now = time.monotonic()
        if now < self._tell_again_at.get(hotkey, 0.0):
            return False
        self._tell_again_at[hotkey] = now + TOLD_AGAIN_SECONDS
        return True


class _Handlers:
    """The DHT's handlers behind the authorizer, for callers that own the token's key.

    Hivemind's own wrapper does not check the caller, so a peer could forward another's request as
    its own, and read the answer.
    """

    def __init__(self, protocol: Any):
        self._protected = AuthRPCWrapper(protocol, AuthRole.SERVICER, protocol.authorizer)

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._call, getattr(self._protected, name))

    async def _call(self, method: Callable[..., Awaitable[Any]], request: Any, context: Any) -> Any:
        key = request.auth.client_access_token.public_key
        response = None
        if peer_id_of_key(key) == str(context.remote_id):
            response = await method(request, context)
        if response is None:
            raise SwarmError("not a registered peer of this run")
        return response


async def guard(_dht: Any, node: Any) -> None:
    """Put the DHT's handlers behind `_Handlers`; runs in the DHT's process, before the authorizer
    admits anybody."""
    protocol = node.protocol
    if not protocol.client_mode:  # a client has no handlers
        await protocol.remove_p2p_handlers(protocol.p2p)
        await protocol.add_p2p_handlers(protocol.p2p, _Handlers(protocol))


async def change_admitted(
    _dht: Any, node: Any, *, added: Collection[str] = (), dropped: Collection[str] = ()
) -> None:
    """Runs in the DHT's process: add and remove admitted hotkeys.

    Unknown peers are removed from the routing table too: stored records are sent to those in it
    without a check.
    """
    authorizer, table = node.protocol.authorizer, node.protocol.routing_table
    authorizer.admit((authorizer.admitted | frozenset(added)) - frozenset(dropped))
    for node_id, peer_id in list(table.uid_to_peer_id.items()):
        if authorizer.hotkey_of(str(peer_id)) is None:
            del table[node_id]


async def proved_peers(_dht: Any, node: Any) -> dict[str, str]:
    """Runs in the DHT's process: the registered hotkeys of other peers, by peer id."""
    authorizer: Authorizer = node.protocol.authorizer
    return authorizer.proved()


async def known_hotkey(_dht: Any, node: Any, *, peer_id: str) -> str | None:
    """Runs in the DHT's process: as `identify`, but nobody is asked."""
    authorizer: Authorizer = node.protocol.authorizer
    return authorizer.hotkey_of(peer_id)


async def identify(_dht: Any, node: Any, *, peer_id: str, timeout_seconds: float) -> str | None:
    """Runs in the DHT's process: the admitted hotkey that this peer id has proved, or None.

    An unknown peer is pinged, and its signed answer proves it.
    """
    authorizer: Authorizer = node.protocol.authorizer
    return await authorizer.identify(
        peer_id, ask=node.protocol.call_ping, timeout_seconds=timeout_seconds
    )


def _statement(token: Any) -> bytes:
    """What the hotkey signs: every field with its length."""
    fields = (token.username.encode(), token.public_key, token.expiration_time.encode())
    return DOMAIN + b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def _claim(token: Any) -> tuple[str, str, float] | None:
    """The hotkey, run id and expiry that a token claims, or None if it is malformed.

    Uses no cryptography, and nothing that is slow for a long field.
    """
    names = USERNAME.fullmatch(token.username)
    if names is None or len(token.signature) != 64 or len(token.public_key) > MAX_PUBLIC_KEY:
        return None
    if len(token.expiration_time) > MAX_TIME:
        return None
    try:
        expires = float(token.expiration_time)
    except ValueError:
        return None
    return (names[1], names[2], expires) if math.isfinite(expires) else None
