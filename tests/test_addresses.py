"""The address that others reach this machine at."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from embedded_network import on_testnet
from small_neurons import Running, SmallMiner, miner_settings

from hiveminer.config.settings import MinerSettings
from hiveminer.errors import OperatorError
from hiveminer.runtime import addresses
from hiveminer.swarm.membership import announced_ip
from programs import wait_for


@pytest.mark.parametrize(
    ("ip", "kind", "word"),
    [
        ("93.184.216.34", "public", ""),
        ("10.1.2.3", "doubtful", "private"),
        ("192.168.0.7", "doubtful", "private"),
        ("100.64.0.1", "doubtful", "private"),
        ("2606:4700::1111", "doubtful", "IPv6"),
        ("fd00::1", "doubtful", "private"),
        ("127.0.0.1", "refused", "loopback"),
        ("::1", "refused", "loopback"),
        ("0.0.0.0", "refused", "every address"),
        ("::", "refused", "every address"),
        ("::ffff:93.184.216.34", "refused", "write 93.184.216.34"),
        ("224.0.0.1", "refused", "not a single host"),
        ("255.255.255.255", "refused", "not a single host"),
        ("169.254.1.1", "refused", "not a single host"),
    ],
)
def test_an_address_is_judged(ip: str, kind: str, word: str) -> None:
    if kind == "refused":
        with pytest.raises(ValueError, match=word):
            addresses.check(ip)
    else:
        assert bool(addresses.check(ip)) == (kind == "doubtful")
        assert word in addresses.check(ip)


class Service(ThreadingHTTPServer):
    """Answers each GET with the text that its path names."""

    daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        words = self.path[1:]
        self.send_response(500 if words == "broken" else 200)
        self.end_headers()
        if words == "slow":
            time.sleep(1.0)
        if words == "endless":
            words = "1" * 100_000
        self.wfile.write(words.encode() + b"\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service(("127.0.0.1", 0), _Answer) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join(60)


def test_two_services_that_agree_are_believed(service: Service) -> None:
    url = f"{service.url}/93.184.216.34"
    assert addresses.ask_outside(services=(url, url)) == "93.184.216.34"
    six = f"{service.url}/2606:4700::1111"
    assert addresses.ask_outside(services=(six, six)) == "2606:4700::1111"


@pytest.mark.timeout(60)  # although one of them never ends
@pytest.mark.parametrize("other", ["93.184.216.35", "broken", "slow", "endless", "nonsense"])
def test_otherwise_the_operator_is_asked_in_one_line(service: Service, other: str) -> None:
    urls = (f"{service.url}/93.184.216.34", f"{service.url}/{other}")
    with pytest.raises(OperatorError) as raised:
        addresses.ask_outside(services=urls, timeout_seconds=0.5)
    message = str(raised.value)
    assert "give it with --axon.external_ip" in message
    assert f"{urls[1]} said" in message
    assert "\n" not in message


def test_a_service_that_is_not_there_is_no_traceback() -> None:
    with pytest.raises(OperatorError, match="said nothing"):
        addresses.ask_outside(services=("http://127.0.0.1:1/", "http://127.0.0.1:1/x"))


# In a miner's life ---------------------------------------------------------------------------


def settings_on_testnet(folder: Path, **axon: Any) -> MinerSettings:
    return miner_settings(folder, subtensor={"network": "test"}, axon={"port": 0} | axon)


def test_the_address_is_asked_for_once_and_put_on_the_chain(tmp_path: Path) -> None:
    open_chain, asked = on_testnet(tmp_path), []

    def ask() -> str:
        asked.append(1)
        return "93.184.216.34"

    settings = settings_on_testnet(tmp_path)
    with (
        open_chain() as chain,
        SmallMiner(settings, chain=chain, ask_outside=ask) as miner,
    ):
        program = Running(miner)
        wanted = f"93.184.216.34:{program.endpoint().port}"
        wait_for(lambda: chain.metagraph().neuron(0).axon == wanted, seconds=60)
        assert miner.public_ip == "93.184.216.34"
        miner.neuron.stopping.set()
        program.thread.join(60)
    assert asked == [1]
    assert program.error is None

    # Another time the services cannot be reached: what stands on the chain is kept.
    def nobody() -> str:
        return addresses.ask_outside(services=("http://127.0.0.1:1/",))

    with (
        open_chain() as chain,
        SmallMiner(settings, chain=chain, ask_outside=nobody) as miner,
    ):
        assert miner.public_ip == "93.184.216.34"


def test_a_given_address_is_not_asked_for_and_is_checked_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_chain = on_testnet(tmp_path)

    def ask() -> str:
        raise AssertionError

    for ip, flag in (("127.0.0.1", "axon"), ("::ffff:1.2.3.4", "axon"), ("127.0.0.1", "dht")):
        settings = miner_settings(
            tmp_path, subtensor={"network": "test"}, **{flag: {"external_ip": ip}}
        )
        with open_chain() as chain, pytest.raises(OperatorError) as raised:
            SmallMiner(settings, chain=chain, ask_outside=ask)
        assert str(raised.value).endswith(f"give the public address with --{flag}.external_ip")
    with open_chain() as chain:
        SmallMiner(
            settings_on_testnet(tmp_path, external_ip="10.0.0.9"), chain=chain, ask_outside=ask
        )
        assert "10.0.0.9 is a private address" in caplog.text


@pytest.mark.parametrize(
    ("dht", "announced"),
    [
        ({}, "93.184.216.34"),
        ({"external_ip": "93.184.216.35"}, "93.184.216.35"),
        ({"ip": "93.184.216.36"}, None),
    ],
)
def test_peers_are_told_the_same_address(
    tmp_path: Path, dht: dict[str, str], announced: str | None
) -> None:
    asked: list[str] = []

    def public_ip() -> str:
        asked.append("asked")
        return "93.184.216.34"

    settings = miner_settings(tmp_path, subtensor={"network": "test"}, dht={"port": 0} | dht)
    assert announced_ip(settings, public_ip) == announced
    assert len(asked) == (announced == "93.184.216.34")
