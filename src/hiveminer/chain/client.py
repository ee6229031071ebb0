"""The chain's reads and writes as synchronous, thread-safe calls.

Each call has a deadline, reads are retried when the connection fails, and the SDK's exceptions
become one of this package's errors, in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import bittensor as bt
from bittensor.settings import DEFAULT_ERA_PERIOD

from hiveminer.chain import retry
from hiveminer.chain.connection import Connection
from hiveminer.chain.embedded.substrate import EmbeddedSubstrate
from hiveminer.chain.turns import Turns
from hiveminer.config.settings import Settings
from hiveminer.errors import ChainError, HiveminerError, NotRegistered, OperatorError, one_line

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
"""The value of `--subtensor.network` that means the network in a file."""

MAX_COMMITMENT_BYTES = 512

# The call waited too long in the pool, or its block was dropped in a reorganization. It may still
# be included.
_IN_DOUBT = frozenset({"FinalityTimeout", "Retracted", "Usurped", "Dropped"})
_IN_DOUBT_WORDS = ("may already be in the pool", "already imported")

T = TypeVar("T")
Wallet = bt.Wallet | bt.KeyedWallet


class Chain:
    """One subnet of one network, for one wallet; usable from any thread.

    network: "embedded", or the SDK's network. wallet: with the hotkey that signs (only
    `join_embedded` needs a coldkey). timeout_seconds: of a read; a write, which waits for its
    block, has twice as long. Writes are sent one after the other. In a forked child, calls raise
    `ChainError` at once.

    Raises `ChainError` if the network cannot be reached in time, unless `must_connect` is off:
    then each later call tries to connect. Raises `OperatorError` if the embedded network's file
    cannot be used.
    """

    def __init__(
        self,
        *,
        network: str,
        netuid: int,
        wallet: Wallet,
        client: bt.Client,
        timeout_seconds: float = 30.0,
        must_connect: bool = True,
    ):
        self.network = network
        self.embedded = network == EMBEDDED
        self.netuid = netuid
        self.wallet = wallet
        self.hotkey: str = wallet.hotkey.ss58_address
        self._timeout_seconds = timeout_seconds
        self._block_seconds: float | None = None
        # Inclusion is enough: waiting for finality would block the caller for half a minute, and
        # what follows is read from the chain anyway.
        self._by_us: dict[str, Any] = {"wallet": wallet, "wait_for_finalization": False}
        self._turns = Turns()
        self._connection = Connection(client, network=network)
        try:
            self.read("connecting", self._connection.connected)
        except BaseException as error:
            if must_connect or not isinstance(error, ChainError):
                self.close()
                raise
            logger.warning("%s; continuing with what is known", error)

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Reads ------------------------------------------------------------------------

    def read(self, doing: str, ask: Callable[[bt.Client], Awaitable[T]]) -> T:
        """Any read of the SDK, with this chain's deadline, retries and errors.

        doing: names it in an error, such as "reading the price". Raises ChainError,
        OperatorError or NotRegistered.
        """
        return self._call(doing, ask, seconds=self._timeout_seconds, attempts=retry.READ_ATTEMPTS)

    def block(self) -> int:
        """The current block's number."""
        return self.read("reading the block", lambda client: client.block())

    def final_block(self) -> int:
        """The newest final block's number."""
        return self.read("reading the final block", lambda client: client.finalized_block())

    def block_seconds(self) -> float:
        """Seconds per block; read once."""
        if self._block_seconds is None:
            self._block_seconds = self.read(
                "reading the block time", lambda client: client.block_time()
            )
        return self._block_seconds

    def metagraph(self) -> bt.Metagraph:
        """The subnet's neurons with their axons, stakes and commitments.

        Raises `OperatorError` if the network has no such subnet.
        """
        return self._of_subnet(
            "reading the metagraph", lambda client: client.subnets.metagraph(self.netuid)
        )

    def uid(self) -> int | None:
        """This wallet's uid, or None if its hotkey is not registered."""
        return self.read(
            "reading the uid",
            lambda client: client.neurons.uid(hotkey_ss58=self.hotkey, netuid=self.netuid),
        )

    def commitments(self, metagraph: bt.Metagraph | None = None) -> dict[str, bytes]:
        """The registered neurons' commitments by hotkey, without those that are not plain bytes.
        Asks the chain if no metagraph is given."""
        graph = self.metagraph() if metagraph is None else metagraph
        return {
            each.hotkey: data
            for each in graph.commitments.values()
            if (data := committed_bytes(each.fields)) is not None
        }

    def weights_of(self, uid: int) -> dict[int, int]:
        """The weights that a validator has set, {uid: 0..65535}, without unrevealed ones."""
        found = self.read(
            "reading weights",
            lambda client: client.query(("SubtensorModule", "Weights"), [self.netuid, uid]),
        )
        return {int(target): int(value) for target, value in found or []}

    def hyperparameters(self) -> dict[str, Any]:
        """The subnet's hyperparameters by name: `weights_rate_limit`, `activity_cutoff`, ..."""
        return self._of_subnet(
            "reading the subnet's hyperparameters",
            lambda client: client.read("subnet_hyperparameters", netuid=self.netuid),
        )

    def _of_subnet(self, doing: str, ask: Callable[[bt.Client], Awaitable[T | None]]) -> T:
        found = self.read(doing, ask)
        if found is None:
            raise self._no_subnet()
        return found

    def commitment_space(self) -> int | None:
        """Bytes that a hotkey may commit in one epoch; None where the chain does not say."""
        doing, item = "reading the space for commitments", ("Commitments", "MaxSpace")
        try:
            found = self.read(doing, lambda client: client.query(item, []))
        except ChainError as error:
            if not error.refused:
                raise
            return None
        return int(found) or None

    def price(self) -> float:
        """The current price of a registration, in TAO."""
        found = self.read("reading the price", lambda client: client.subnets.burn(self.netuid))
        return float(found.tao)

    def registration(self) -> str:
        """The command that registers this hotkey, for the machine that has the coldkey."""
        name = getattr(self.wallet, "name", "NAME")
        hotkey = getattr(self.wallet, "hotkey_str", "HOTKEY")
        return (
            f"register it where the coldkey is: btcli tx burned-register --netuid {self.netuid} "
            f"--wallet {name} --wallet-hotkey {hotkey} --network {self.network}"
        )

    # Writes -----------------------------------------------------------------------

    def serve_axon(self, ip: str, port: int) -> None:
        """Publish this neuron's address. Raises `ChainError` if the chain refuses it, or if the
        rate limit has not passed."""
        intent = bt.ServeAxon(netuid=self.netuid, ip=ip, port=port)
        self._write("serving the axon", lambda client: client.execute(intent, **self._by_us))

    def commit(
        self, data: bytes, *, valid_blocks: int = DEFAULT_ERA_PERIOD, urgent: bool = False
    ) -> None:
        """Publish up to 512 bytes for this neuron, in place of its earlier commitment.

        The signed call expires after `valid_blocks`. `urgent` lets it overtake other waiting
        calls. Raises `ValueError` if the data is too long.
        """
        if len(data) > MAX_COMMITMENT_BYTES:
            raise ValueError(f"a commitment holds {MAX_COMMITMENT_BYTES} bytes, not {len(data)}")
        kind = f"Raw{len(data)}" if len(data) <= 128 else "BigRaw"
        call = bt.calls.Commitments.set_commitment(
            netuid=self.netuid, info={"fields": [{kind: "0x" + data.hex()}]}
        )
        self._write(
            "committing",
            lambda client: client.submit_call(
                call, signer="hotkey", period=valid_blocks, **self._by_us
            ),
            urgent=urgent,
        )

    def set_weights(
        self,
        weights: Mapping[int, float],
        *,
        version_key: int = 0,
        valid_blocks: int = DEFAULT_ERA_PERIOD,
    ) -> None:
        """Set this validator's weights, {uid: weight}; only their proportions matter.

        The SDK fits them to the subnet's limits and chooses between plain and commit-reveal.
        `version_key` must not be older than the subnet's. The signed call expires after
        `valid_blocks`. Raises `ChainError` within the rate limit, or without a permit.
        """
        intent = bt.SetWeights(netuid=self.netuid, weights=dict(weights), version_key=version_key)
        self._write(
            "setting weights",
            lambda client: client.execute(intent, period=valid_blocks, **self._by_us),
        )

    def submit_as_coldkey(self, doing: str, call: Any) -> None:
        """Submit a generated call (`bittensor.calls`), signed by the wallet's coldkey."""
        self._write(doing, lambda client: client.submit_call(call, **self._by_us))

    # Calls and their errors -------------------------------------------------------

    def _write(
        self,
        doing: str,
        send: Callable[[bt.Client], Awaitable[bt.ExtrinsicResult]],
        *,
        urgent: bool = False,
    ) -> None:
        async def ask(client: bt.Client) -> None:
            (await send(client)).raise_for_failure()

        # Sent once: a write whose connection failed may have arrived.
        hint = "; it may still be included, so check before sending it again"
        seconds = 2 * self._timeout_seconds
        with self._turns.take(urgent=urgent, timeout_seconds=seconds):
            self._call(doing, ask, seconds=seconds, attempts=1, hint=hint)

    def _call(
        self,
        doing: str,
        ask: Callable[[bt.Client], Awaitable[T]],
        *,
        seconds: float,
        attempts: int,
        hint: str = "",
    ) -> T:
        try:
            return self._connection.call(doing, ask, seconds=seconds, attempts=attempts, hint=hint)
        except HiveminerError:
            raise
        except Exception as error:
            raise self._explained(doing, error, hint) from error

    def _explained(self, doing: str, error: Exception, hint: str) -> HiveminerError:
        if isinstance(error, bt.ChainError):
            if error.code is bt.ErrorCode.NOT_REGISTERED or error.name == "AccountNotAllowedCommit":
                cure = "restart to register again" if self.embedded else self.registration()
                return NotRegistered(
                    f"{doing}: hotkey {self.hotkey} is not registered on subnet {self.netuid} of "
                    f"{self.network}; {cure}"
                )
            if error.code is bt.ErrorCode.SUBNET_NOT_EXISTS:
                return self._no_subnet()
        text, refused = f"{doing} on {self.network}: {one_line(error)[:500]}", ""
        broken = isinstance(error, retry.TRANSIENT)
        if hint and (broken or _is_in_doubt(error)):
            return ChainError(text + hint, may_stand=True)
        if not broken:
            refused = error.code.name if isinstance(error, bt.ChainError) else type(error).__name__
        return ChainError(text, refused=refused)

    def _no_subnet(self) -> OperatorError:
        return OperatorError(
            f"{self.network} has no subnet {self.netuid}; choose an existing one with --netuid"
        )

    def close(self) -> None:
        """End the connection; calls in progress fail. Idempotent."""
        self._connection.close()


def _is_in_doubt(error: Exception) -> bool:
    """Whether a call may be included in spite of the error.

    For a connection that broke during the submission the SDK raises an error without a name and of
    unknown kind; a refusal by the chain has a name or a kind.
    """
    if not isinstance(error, bt.ChainError):
        return False
    words = str(error).lower()
    nameless = error.name is None and error.code is bt.ErrorCode.UNKNOWN
    return nameless or error.name in _IN_DOUBT or any(each in words for each in _IN_DOUBT_WORDS)


def committed_bytes(fields: Sequence[Any]) -> bytes | None:
    """The content of a commitment's fields; None unless it is plain bytes."""
    try:
        parts = [part for field in fields for part in field.items()]
        plain = all(variant.startswith(("Raw", "BigRaw")) for variant, _ in parts)
        data = b"".join(bytes.fromhex(value.removeprefix("0x")) for _, value in parts)
    except (AttributeError, TypeError, ValueError):  # neither bytes nor hexadecimal digits
        return None
    return data if parts and plain and len(data) <= MAX_COMMITMENT_BYTES else None


def open_chain(
    *,
    network: str,
    netuid: int,
    wallet: Wallet,
    path: Path | None = None,
    block_seconds: float = 1.0,
    **options: Any,
) -> Chain:
    """A chain for a value of `--subtensor.network`, with options of `Chain`.

    "embedded" is the network in the file `path`, which is created, with blocks of
    `block_seconds`, if it does not exist; finney, test, local and ws:// or wss:// addresses
    are the real SDK's. Raises as `Chain` does.
    """
    if network == EMBEDDED:
        assert path is not None, "the embedded network needs a file"
        # The label has no meaning here, but must not be a public network's.
        client = bt.Client("local", substrate=EmbeddedSubstrate(path, block_seconds=block_seconds))
    else:
        client = bt.Client(network)
    return Chain(network=network, netuid=netuid, wallet=wallet, client=client, **options)


def open_subnet(settings: Settings, wallet: Wallet, **options: Any) -> Chain:
    """The subnet that the settings name, with options of `Chain`. Raises as `open_chain` does."""
    return open_chain(
        network=settings.subtensor.network,
        netuid=settings.netuid,
        wallet=wallet,
        path=settings.subtensor.file,
        block_seconds=settings.subtensor.block_seconds,
        **options,
    )


def join_embedded(chain: Chain, *, stake_tao: float = 0.0) -> int:
    """Make this wallet a neuron of the embedded network, and return its uid.

    Registers its hotkey if needed, and stakes up to `stake_tao` TAO on it (on the root subnet,
    which counts on every subnet). The network funds the coldkey.
    Raises `OperatorError` on any other network.
    """
    if not chain.embedded:
        raise OperatorError(
            f"only the embedded network registers automatically; on {chain.network}, use btcli"
        )
    if chain.uid() is None:
        chain.submit_as_coldkey(
            "registering",
            bt.calls.SubtensorModule.burned_register(netuid=chain.netuid, hotkey=chain.hotkey),
        )
    held = chain.read(
        "reading the stake",
        lambda client: client.query(("SubtensorModule", "TotalHotkeyAlpha"), [chain.hotkey, 0]),
    )
    missing = int(Decimal(str(stake_tao)) * 10**9) - int(held)
    if missing > 0:
        chain.submit_as_coldkey(
            "staking",
            bt.calls.SubtensorModule.add_stake(
                hotkey=chain.hotkey, netuid=0, amount_staked=missing
            ),
        )
    uid = chain.uid()
    if uid is None:
        raise ChainError(f"hotkey {chain.hotkey} lost its uid right after it registered")
    return uid
