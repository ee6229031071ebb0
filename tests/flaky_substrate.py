"""An embedded network that fails on purpose, beneath the real SDK's client.

Each fault is an attribute that a test sets and clears; several may be set at once. What
really reached the network is counted, so that a test can say "exactly once".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import bittensor as bt
from chain_worker import Keys, new_keys

from hiveminer.chain import EmbeddedSubstrate
from hiveminer.chain.embedded.substrate import Composed

WEIGHTS = ("set_weights", "set_mechanism_weights")


class FlakySubstrate(EmbeddedSubstrate):
    """`EmbeddedSubstrate` with faults."""

    def __init__(self, path: Path, **options: Any):
        super().__init__(path, **options)
        self.down = False
        """No call gets through at all."""
        self.reads_to_drop = 0
        self.delay_seconds = 0.0
        self.requests_to_lose = 0
        """Calls that break the connection before they arrive."""
        self.answers_to_lose = 0
        """Calls that arrive, and whose answer breaks the connection."""
        self.calls_to_hold = 0
        """Calls that stay in the pool, answered with `held_as`."""
        self.held_as = refusal("extrinsic finalitytimeout", name="FinalityTimeout")
        self.wrong_nonces = 0
        self.refusals: list[bt.ExtrinsicResult] = []
        """Answered in their order instead of doing what was asked."""
        self.stale_blocks = 0
        """The node lags: it tells the state as of so many blocks ago, by number."""
        self.before_weights: Callable[[], None] = lambda: None
        """Done once, after the client has read the chain and before weights arrive."""
        self.weights_set = 0
        self.submitted = 0
        self._held: list[tuple[Composed, Any]] = []

    def fail(self, *, for_seconds: float | None = None, **faults: Any) -> None:
        """Set these attributes; after `for_seconds`, put them back and include what was held."""
        before = {name: getattr(self, name) for name in faults}
        vars(self).update({name: copy(value) for name, value in faults.items()})
        if for_seconds is not None:
            Timer(for_seconds, self._recover, [before]).start()

    def _recover(self, before: dict[str, Any]) -> None:
        vars(self).update(before)
        held, self._held = self._held, []
        for call, keypair in held:
            asyncio.run(self._include(call, keypair))

    # Reads ------------------------------------------------------------------------

    async def _falter(self) -> None:
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        if self.down:
            raise bt.RpcConnectionError("the node is away")
        if self.reads_to_drop > 0:
            self.reads_to_drop -= 1
            raise bt.RpcConnectionError("the connection is lost")

    async def connect(self) -> None:
        await self._falter()
        await super().connect()

    async def block_number(self) -> int:
        await self._falter()
        return await super().block_number() - self.stale_blocks

    async def query(self, *arguments: Any, **named: Any) -> Any:
        await self._falter()
        return await super().query(*arguments, **named)

    async def query_map(self, *arguments: Any, **named: Any) -> list[tuple[Any, Any]]:
        await self._falter()
        return await super().query_map(*arguments, **named)

    async def runtime_call(self, *arguments: Any, **named: Any) -> Any:
        await self._falter()
        found = await super().runtime_call(*arguments, **named)
        if self.stale_blocks and isinstance(found, dict) and "block" in found:
            found["block"] -= self.stale_blocks
        return found

    # Calls ------------------------------------------------------------------------

    async def submit(
        self, call: Composed, keypair: Any, *, nonce: int | None = None, **options: Any
    ) -> bt.ExtrinsicResult:
        await self._falter()
        self.submitted += 1
        if call.function in WEIGHTS:
            act, self.before_weights = self.before_weights, lambda: None
            act()
        if self.requests_to_lose > 0:
            self.requests_to_lose -= 1
            raise bt.RpcConnectionError("the connection broke on the way")
        if self.refusals:
            return self.refusals.pop(0)
        if self.calls_to_hold > 0:
            self.calls_to_hold -= 1
            self._held.append((call, keypair))
            return self.held_as
        if self.wrong_nonces > 0:
            self.wrong_nonces -= 1
            nonce = await self.account_next_index(str(keypair.ss58_address)) + 1
        result = await self._include(call, keypair, nonce=nonce, **options)
        if self.answers_to_lose > 0:
            self.answers_to_lose -= 1
            raise bt.RpcConnectionError("the connection broke on the way back")
        return result

    async def _include(self, call: Composed, keypair: Any, **options: Any) -> bt.ExtrinsicResult:
        result = await super().submit(call, keypair, **options)
        if result.success and call.function in WEIGHTS:
            self.weights_set += 1
        return replace(result)

    # What others do on the network -------------------------------------------------

    def give_away(self, hotkey: str, *, netuid: int = 1) -> Keys:
        """Take a neuron's uid, and let a newcomer register into it."""
        self.deregister(hotkey, netuid=netuid)
        newcomer = new_keys()

        async def register() -> None:
            async with bt.Client("local", substrate=EmbeddedSubstrate(self._ledger.path)) as client:
                call = bt.calls.SubtensorModule.burned_register(
                    netuid=netuid, hotkey=newcomer.hotkey.ss58_address
                )
                (await client.submit_call(call, newcomer)).raise_for_failure()

        run_apart(register)
        return newcomer


def refusal(message: str, *, name: str | None = None) -> bt.ExtrinsicResult:
    """What the SDK gives back for a call that failed on the chain."""
    return bt.ExtrinsicResult(
        success=False, message=message, error=bt.ChainError(message, name) if name else None
    )


def run_apart(coroutine: Callable[[], Any]) -> None:
    """Run to its end from within a running event loop, too."""
    thread = Thread(target=lambda: asyncio.run(coroutine()))
    thread.start()
    thread.join()
