"""Who the axon serves and who it refuses, with what status, on a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from bittensor import http_auth
from serving import (
    BODY,
    ED25519,
    MINER,
    NO_PERMIT,
    OTHER,
    UNKNOWN,
    VALIDATOR,
    Served,
    ns,
    served_axon,  # noqa: F401 - a fixture
    serving,
    shared_axon,  # noqa: F401 - a fixture
    signed,
    ss58,
    status_of,
    train,
    until,
)

from hiveminer.errors import Refused
from hiveminer.protocol import IsAlive, Train
from hiveminer.rpc.metrics import RefusalLog, SilenceWatch
from hiveminer.rpc.queue import WorkQueue
from hiveminer.rpc.signatures import ANSWER_METHOD, answer_path

# Who is served


def signer_of(response: httpx.Response, request: Mapping[str, str]) -> str:
    """Who has signed this answer to that request, whose headers are given."""
    nonce = request[http_auth.HEADER_NONCE]
    caller = http_auth.verify(
        response.headers,
        response.content,
        method=ANSWER_METHOD,
        path=answer_path("/Train", nonce, response.status_code),
        self_hotkey_ss58=ss58(VALIDATOR),
        nonce_store=http_auth.InMemoryNonceStore(),
    )
    return caller.hotkey_ss58


def test_a_signed_call_is_answered_and_the_answer_is_signed_for_that_call(shared: Served) -> None:
    body = train("signed")
    headers = signed(body)
    response = shared.send(body, headers)
    assert response.status_code == 200
    answer = Train.model_validate_json(response.content)
    assert (answer.loss, answer.samples, answer.dataset_indices) == (2.5, 3, [3, 1, 2])
    assert signer_of(response, headers) == ss58(MINER)
    assert shared.threads == {"worker"}


def test_the_query_is_part_of_what_is_signed(shared: Served) -> None:
    path = "/IsAlive?a=%2F&b=1"
    assert shared.send(b"{}", signed(b"{}", path=path), path=path).status_code == 200


def test_a_stranger_learns_that_it_is_alive_and_gets_no_signature(shared: Served) -> None:
    for method, path, status in [
        ("GET", "/", 200),
        ("POST", "/", 405),
        ("GET", "/Train", 405),
        ("PUT", "/IsAlive", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/train", 404),
        ("POST", "/%54rain", 404),
        ("POST", "/Train/", 404),
        ("POST", "/Train", 401),
    ]:
        response = shared.send(b"", {}, path=path, method=method)
        assert response.status_code == status, (method, path)
        assert len(response.content) < 100
        assert not [name for name in response.headers if name.startswith("x-bittensor")]
        assert "server" not in response.headers


def test_an_error_to_a_proved_caller_is_signed_too(shared: Served) -> None:
    body = train("no", batch_size=0)
    headers = signed(body)
    response = shared.send(body, headers)
    assert (response.status_code, signer_of(response, headers)) == (422, ss58(MINER))


# Who is not


TAMPERED: dict[str, tuple[Callable[[], dict[str, str]], str]] = {
    "another body": (lambda: signed(train("another")), "signature"),
    "another path": (lambda: signed(BODY, path="/IsAlive"), "signature"),
    "another query": (lambda: signed(BODY, path="/Train?a=1"), "signature"),
    "another method": (lambda: signed(BODY, method="GET"), "signature"),
    "another receiver": (lambda: signed(BODY, to=OTHER), "receiver"),
    "no receiver": (lambda: signed(BODY, to=None), "receiver"),
    "another's signature": (
        lambda: {**signed(BODY, by=OTHER), http_auth.HEADER_HOTKEY: ss58(VALIDATOR)},
        "signature",
    ),
    "an hour old": (lambda: signed(BODY, nonce_ns=ns(-3600)), "stale"),
    "a year ahead": (lambda: signed(BODY, nonce_ns=ns(365 * 86400)), "stale"),
    "ed25519": (lambda: signed(BODY, by=ED25519), "credentials"),
    "ed25519, not said": (
        lambda: {
            name: value
            for name, value in signed(BODY, by=ED25519).items()
            if name != http_auth.HEADER_CRYPTO
        },
        "signature",
    ),
    "no signature": (lambda: {http_auth.HEADER_HOTKEY: ss58(VALIDATOR)}, "credentials"),
    "a signature of another length": (
        lambda: {**signed(BODY), http_auth.HEADER_SIGNATURE: "0x1234"},
        "credentials",
    ),
    "a signature that is no hex": (
        lambda: {**signed(BODY), http_auth.HEADER_SIGNATURE: "zz"},
        "credentials",
    ),
    "a long nonce": (
        lambda: {**signed(BODY), http_auth.HEADER_NONCE: "1" * 4000},
        "credentials",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_is_not_as_it_was_signed_is_refused(shared: Served, case: str) -> None:
    make, kind = TAMPERED[case]
    before = shared.axon.counts[kind]
    response = shared.send(BODY, make())
    assert response.status_code == 401
    assert response.json()["detail"]
    assert shared.axon.counts[kind] == before + 1
    assert "never trained" not in shared.trained


def test_a_replay_is_refused_and_a_retry_is_not(shared: Served) -> None:
    body = train("replayed")
    headers = signed(body)
    assert shared.send(body, headers).status_code == 200
    replay = shared.send(body, headers)
    assert (replay.status_code, replay.json()["detail"]) == (
        401,
        "this nonce was already accepted from this hotkey",
    )
    assert shared.call(body).status_code == 200
    assert shared.trained.count("replayed") == 1


def test_only_the_registered_are_served_and_only_the_permitted_trained_for(
    shared: Served,
) -> None:
    for path in ("/IsAlive", "/Train"):
        unknown = shared.call(BODY, path=path, by=UNKNOWN)
        assert unknown.status_code == 403
        assert "not registered" in unknown.json()["detail"]
    assert shared.alive(by=NO_PERMIT).status_code == 200
    no_permit = shared.call(BODY, by=NO_PERMIT)
    assert no_permit.status_code == 403
    assert "permit" in no_permit.json()["detail"]
    assert "never trained" not in shared.trained


def test_the_blacklist_is_asked_before_the_body_and_sees_only_the_caller() -> None:
    seen: list[tuple[str, str]] = []

    def blacklist(synapse: Train) -> tuple[bool, str]:
        seen.append((synapse.dendrite.hotkey, synapse.dendrite.ip))
        return True, "closed today"

    with serving(train={"blacklist": blacklist}) as served:
        head = {"content-length": "5000", http_auth.HEADER_HOTKEY: ss58(VALIDATOR)}
        with served.raw_call(b"", head) as connection:
            assert status_of(connection) == 403
    assert seen == [(ss58(VALIDATOR), "127.0.0.1")]


# The queue


def test_is_alive_is_answered_while_the_worker_is_busy(served: Served) -> None:
    served.gate.clear()
    with ThreadPoolExecutor() as pool:
        training = pool.submit(served.call, train())
        until(lambda: served.queue.busy)
        assert served.alive().json()["completion"] is True
        assert served.queue.busy
        served.gate.set()
        assert training.result(60).status_code == 200


def test_the_same_request_trains_once_also_at_the_same_time(served: Served) -> None:
    served.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(served.call, train("same")) for _ in range(6)]
        until(lambda: len(served.axon._callers._seen) == 6)
        served.gate.set()
        answers = {call.result(60).content for call in calls}
    answers.add(served.call(train("same")).content)
    assert len(answers) == 1
    assert served.call(train("same"), by=OTHER).status_code == 200
    assert served.trained == ["same", "same"]


def test_another_body_under_the_same_request_id_is_refused(served: Served) -> None:
    served.gate.clear()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(served.call, train("same"))
        until(lambda: served.queue.busy)
        waiting = pool.submit(served.call, train("next"))
        until(lambda: served.queue.waiting == 1)
        others = [train("same", dataset_indices=[7]), train("next", batch_size=4)]
        assert [served.call(body).status_code for body in others] == [409, 409]
        served.gate.set()
        assert [each.result(60).status_code for each in (running, waiting)] == [200, 200]
    other = served.call(others[0])
    assert (other.status_code, "another request" in other.json()["detail"]) == (409, True)
    # The same content in another order is the same request; another caller's is its own.
    again = json.dumps(dict(reversed(json.loads(train("same")).items()))).encode()
    assert served.call(again).json()["samples"] == 3
    assert served.call(others[0], by=OTHER).json()["samples"] == 1
    assert served.trained == ["same", "next", "same"]


def test_a_full_queue_says_when_to_come_again_and_others_have_their_share() -> None:
    with serving(queue=WorkQueue(capacity=4, share=1)) as served, ThreadPoolExecutor() as pool:
        served.gate.clear()
        pool.submit(served.call, train("running"))
        until(lambda: served.queue.busy)
        pool.submit(served.call, train("waiting"))
        until(lambda: served.queue.waiting == 1)
        for attempt in range(3):
            full = served.call(train(f"no {attempt}".replace(" ", "-")))
            assert full.status_code == 429
            assert 1 <= int(full.headers["retry-after"]) <= 600
        other = pool.submit(served.call, train("other"), by=OTHER)
        until(lambda: served.queue.waiting == 2)
        served.gate.set()
        assert other.result(60).status_code == 200


def test_who_hangs_up_frees_the_place_and_stops_no_training(served: Served) -> None:
    served.gate.clear()
    running = train("running")
    head = {**signed(running), "content-length": str(len(running))}
    first = served.raw_call(running, head)
    until(lambda: served.queue.busy)
    waiting = train("waiting")
    second = served.raw_call(waiting, {**signed(waiting), "content-length": str(len(waiting))})
    until(lambda: served.queue.waiting == 1)
    first.close()
    second.close()
    until(lambda: served.queue.waiting == 0)
    until(lambda: served.axon.counts["hung_up"] == 2)
    assert served.queue.busy
    served.gate.set()
    assert served.call(running).json()["loss"] == 2.5
    assert served.trained == ["running"]


def test_what_forward_raises_becomes_a_status_and_the_miner_goes_on(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    for run, status, reason in [
        ("refused", 409, "another run"),
        ("untrainable", 422, "rows without text"),
        ("bug", 500, "the miner failed; see its log"),
    ]:
        response = served.call(train(run, run_id=run))
        assert (response.status_code, response.json()["detail"]) == (status, reason)
    assert "KeyError" in caplog.text
    assert served.call(train("good")).status_code == 200


def test_nobody_waits_beyond_the_limit_though_the_worker_is_busy() -> None:
    with serving(train={"wait_seconds": 0.05}) as served, ThreadPoolExecutor() as pool:
        served.gate.clear()
        running = pool.submit(served.call, train("running"))
        until(lambda: served.queue.busy)
        late = served.call(train("late"))
        assert (late.status_code, "too long" in late.json()["detail"]) == (503, True)
        assert served.queue.waiting == 0
        served.gate.set()
        assert running.result(60).status_code == 200
    assert served.trained == ["running"]


def test_a_check_refuses_before_the_queue_and_an_async_forward_runs_in_the_worker() -> None:
    threads = []

    async def forward(synapse: Train) -> Train:
        await asyncio.sleep(0)
        threads.append(threading.current_thread().name)
        synapse.loss = 1.5
        return synapse

    async def alive(synapse: IsAlive) -> IsAlive:
        synapse.epoch = 7
        return synapse

    def check(synapse: Train) -> None:
        if synapse.run_id != "run":
            raise Refused(409, f"this miner trains run, not {synapse.run_id}")

    with serving(alive={"forward": alive}, train={"forward": forward, "check": check}) as served:
        assert served.call(train("good")).json()["loss"] == 1.5
        other = served.call(train("bad", run_id="another"))
        assert (other.status_code, "not another" in other.json()["detail"]) == (409, True)
        assert served.alive().json()["epoch"] == 7
    assert threads == ["worker"]


# What is to be seen


def test_counts_and_latencies_are_served_and_the_log_is_not_flooded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(metrics_port=0) as served:
        for _ in range(20):
            served.alive(by=UNKNOWN)
        served.alive()
        with httpx.Client(trust_env=False) as client:
            page = client.get(f"http://127.0.0.1:{served.axon.metrics_port}/metrics").text
        assert 'hiveminer_axon_requests_total{kind="blacklist"} 20.0' in page
        assert 'hiveminer_axon_requests_total{kind="answered"} 1.0' in page
        assert 'hiveminer_axon_seconds_count{synapse="IsAlive"} 1.0' in page
    refusals = [record for record in caplog.records if "blacklist" in record.getMessage()]
    assert len(refusals) == 1


def test_the_next_line_of_a_refusal_says_how_many_there_were(
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = iter([0.0, 59.0, 59.0, 61.0])
    refusals = RefusalLog(clock=lambda: next(times))
    for kind in ("blacklist", "blacklist", "path", "blacklist"):
        refusals.refused(kind, "why", "127.0.0.1")
    lines = [line.rpartition("; ")[::2] for line in caplog.messages]
    assert [(line.partition(")")[0], more[:6]) for line, more in lines] == [
        ("refused (blacklist", "0 more"),
        ("refused (path", "0 more"),
        ("refused (blacklist", "1 more"),
    ]


def test_silence_is_told_each_time_that_it_lasts_too_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = iter([0, 599, 600, 601, 1200, 1800, 1801])
    silence = SilenceWatch(port=8091, clock=lambda: next(times))
    for _ in range(4):
        silence.check()
    silence.heard()
    silence.check()
    assert [line[:43] for line in caplog.messages] == [
        "no validator has called for 10 minutes: if ",
        "no validator has called for 20 minutes: if ",
    ]


def test_only_a_validators_verified_call_ends_the_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forged = {**signed(b"{}", by=OTHER, path="/IsAlive"), http_auth.HEADER_HOTKEY: ss58(VALIDATOR)}
    with serving() as served:
        silence = served.axon.silence
        begun = silence.last_call
        assert served.send(b"{}", forged, path="/IsAlive").status_code == 401
        assert served.alive(by=NO_PERMIT).status_code == 200
        assert silence.last_call == begun
        assert served.alive().status_code == 200
        assert silence.last_call > begun
