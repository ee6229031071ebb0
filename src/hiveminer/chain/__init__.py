"""The chain: one `bittensor.Client`, real or embedded, with synchronous calls.

`open_chain` returns a `Chain` for any value of `--subtensor.network`: "embedded" is a network in
one SQLite file, shared by the processes of this machine; anything else goes to the SDK. The calls
are the same on both.
"""

from hiveminer.chain.client import EMBEDDED, Chain, join_embedded, open_chain, open_subnet
from hiveminer.chain.embedded.substrate import EmbeddedSubstrate
from hiveminer.chain.wallets import embedded_wallet, named_embedded_wallet, open_wallet

__all__ = [
    "EMBEDDED",
    "Chain",
    "EmbeddedSubstrate",
    "embedded_wallet",
    "join_embedded",
    "named_embedded_wallet",
    "open_chain",
    "open_subnet",
    "open_wallet",
]
