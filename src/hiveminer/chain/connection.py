"""A `bittensor.Client` in a private event loop, for synchronous callers.

The SDK is asynchronous and this package's threads are not, so an event loop runs in a background
thread. Each call has a deadline, and a lost connection is opened again by the next call.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import bittensor as bt

from hiveminer.chain import retry
from hiveminer.errors import ChainError

logger = logging.getLogger(__name__)

# A call that hangs in the file system cannot be cancelled; its caller is released anyway.
_GRACE_SECONDS = 1.0

T = TypeVar("T")


class Connection:
    """One client, its event loop and the loop's thread; usable from any thread.

    In a forked child, which does not have the thread, calls raise `ChainError` at once, and the
    parent's connection is left alone. network: its name in errors.
    """

    def __init__(self, client: bt.Client, *, network: str):
        self.network = network
        self._client = client
        self._connected = False
        self._connecting = asyncio.Lock()
        self._pid = os.getpid()
        self._closing = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_log_quietly)
        self._thread = threading.Thread(target=self._loop.run_forever, name="chain", daemon=True)
        self._thread.start()

    def call(
        self,
        doing: str,
        ask: Callable[[bt.Client], Awaitable[T]],
        *,
        seconds: float,
        attempts: int,
        hint: str,
    ) -> T:
        """The result of `ask`, which is tried up to `attempts` times within `seconds`.

        doing: names the call in errors. hint: added to errors after which the call may still have
        arrived. Raises `ChainError` in a forked child, after `close`, and without an answer in
        time; exceptions of `ask` are passed on.
        """
        if os.getpid() != self._pid:
            raise ChainError(f"{doing}: this chain belongs to process {self._pid}")
        with self._closing:
            if self._closed:
                raise ChainError(f"{doing}: the chain is closed")
            future = asyncio.run_coroutine_threadsafe(
                asyncio.wait_for(self._try(ask, attempts), seconds), self._loop
            )
        try:
            return future.result(seconds + _GRACE_SECONDS)
        except (TimeoutError, concurrent.futures.CancelledError) as error:
            reason = f"no answer from {self.network} within {seconds:g} s"
            if not isinstance(error, TimeoutError):
                reason = "the chain was closed meanwhile"
            raise ChainError(f"{doing}: {reason}{hint}", may_stand=bool(hint)) from None
        finally:
            future.cancel()

    async def connected(self, client: bt.Client) -> bt.Client:
        """The client, once it is connected."""
        async with self._connecting:
            if not self._connected:
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(client.close(), _GRACE_SECONDS)
                await client.connect()
                self._connected = True
        return client

    async def _try(self, ask: Callable[[bt.Client], Awaitable[T]], attempts: int) -> T:
        async def once() -> T:
            return await ask(await self.connected(self._client))

        try:
            return await retry.of_reads(attempts)(once)
        except (*retry.TRANSIENT, asyncio.CancelledError):
            # A session of the SDK that failed to reconnect stays dead, so the next call opens a
            # new one. (Cancelled: the deadline passed.)
            self._connected = False
            raise

    def close(self) -> None:
        """End the connection, the loop and its thread; calls in progress fail. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._closing:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop).result(4.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2.0)
        if not self._thread.is_alive():
            self._loop.close()

    async def _wind_up(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.close(), 2.0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._loop.shutdown_default_executor(), 1.0)


def _log_quietly(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # The SDK's background tasks fail together with the calls that wait for them, which have
    # reported the error already.
    logger.debug("chain: %s", context.get("message"), exc_info=context.get("exception"))
