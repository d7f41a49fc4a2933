"""Requests that come, go and are given up, on any thread: nothing is kept of them, and nobody waits for ever."""

import random
import resource
import threading
import time

import pytest
from engines import Client, alone, ask, check_empty, drain, engine, prompt, recomputed

from coterie.infer.outputs import Delta
from coterie.infer.request import EngineDead, QueueFull, RequestError, SamplingParams


@pytest.mark.parametrize("steps", range(9))
def test_an_abort_frees_its_blocks_within_a_step(steps: int) -> None:
    """Queued, in the middle of its prompt, forking, decoding, at its last token and after it."""
    served = engine(budget=8, text=True)
    gone = ask(served, prompt(30), 3, n=2)
    stays = ask(served, prompt(5, 1), 30, stop=("never",))
    for _ in range(steps):
        served.step()
    served.abort(gone.id)
    served.abort(gone.id)
    served.step()
    pool, mine = served.core.pool, served.core.scheduler.roster.running.values()
    assert pool.used == sum(len(request.table.blocks) for request in mine if request.table)
    assert {request.id for request in mine} <= {stays.id}
    assert gone.finish(0) in ("abort", "length")
    assert gone.finish(1) in ("abort", "length")
    drain(served)
    assert stays.tokens() == recomputed(prompt(5, 1), 30)
    assert ("length" in {gone.finish(0), gone.finish(1)}) == (steps >= 6)


def test_an_abort_of_what_is_not_there_is_nothing() -> None:
    served = engine()
    served.abort("nobody")
    assert served.idle
    assert not served.step()


def test_five_hundred_requests_leave_nothing_behind() -> None:
    """MII's uids ran out after 9,999 and its dicts only grew."""
    r = random.Random(4)
    served = engine(blocks=44, max_model_len=100, budget=48, max_sequences=9, text=True, max_queued_requests=40)
    clients, refused = [], 0
    while len(clients) < 500:
        try:
            clients.append(_any(r, served))
        except (RequestError, QueueFull):
            refused += 1
        if r.random() < 0.2:
            served.abort(r.choice(clients).id)
        for _ in range(r.randint(0, 4)):
            served.step()
    for client in clients:
        if r.random() < 0.3:
            served.abort(client.id)
    drain(served)
    assert refused > 5
    ends = [client.finish(i) for client in clients for i in range(client.n)]
    assert {"length", "stop", "abort", "deadline", "error"} == set(ends)
    assert served.core.scheduler.roster.preemptions > 20
    fresh = ask(served, prompt(20, 999), 20)
    drain(served)
    assert fresh.tokens() == recomputed(prompt(20, 999), 20)


def test_ids_never_run_out() -> None:
    """MII has 9,999 of them, and hangs after as many errors."""
    served, ends = engine(max_sequences=4), []
    params = SamplingParams(max_tokens=2)
    for _ in range(12):
        ids = [served.submit([1], params, lambda delta: ends.append(delta.finish)) for _ in range(900)]
        for id in ids:
            served.abort(id)
        served.step()
    assert ends == ["abort"] * 10_800
    check_empty(served)
    client = ask(served, prompt(3))
    drain(served)
    assert client.tokens() == recomputed(prompt(3))


def _any(r: random.Random, served) -> Client:
    settings = {
        "temperature": r.choice((0.0, 1.0)),
        "n": r.choice((1, 1, 1, 3)),
        "ignore_eos": r.random() < 0.5,
        "logprobs": r.choice((None, None, 2)),
        "frequency_penalty": r.choice((0.0, 0.5)),
        "stop": r.choice(((), ("e",), ("at", "xyz"))),
        "routes": r.random() < 0.1,
        "salt": r.choice("ab"),
    }
    if r.random() < 0.05:
        settings["deadline"] = time.monotonic() - 1
    client = ask(served, prompt(r.randint(1, 70), r.randint(0, 5)), r.randint(1, 25), **settings)
    client.n = settings["n"]
    if r.random() < 0.05:
        served.core.live[client.id, 0].emit = _raises(client)
    return client


def _raises(client: Client):
    def sink(delta) -> None:
        client(Delta(delta.key, finish="error", generated=len(client.tokens(delta.key[1]))))
        raise OSError

    return sink


def test_many_threads_ask_one_engine() -> None:
    served = engine(text=True, max_sequences=6)
    expected = {n: alone(prompt(n, n), temperature=1.0, seed=n) for n in range(1, 13)}
    got: dict[int, list[list[int]]] = {n: [] for n in expected}
    served.start()
    served.start()

    def client(n: int) -> None:
        for _ in range(3):
            done, box = threading.Event(), Client()

            def sink(delta, box=box, done=done) -> None:
                assert threading.current_thread().name == "coterie-engine"
                box(delta)
                if delta.finish:
                    done.set()

            params = SamplingParams(temperature=1.0, seed=n, max_tokens=12, ignore_eos=True)
            served.submit(prompt(n, n), params, sink)
            assert done.wait(60)
            got[n].append(box.tokens())

    threads = [threading.Thread(target=client, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {n: [tokens] * 3 for n, tokens in expected.items()}
    served.stop()
    check_empty(served)
    assert not served.alive
    assert not served.running


def test_an_idle_engine_sleeps() -> None:
    served = engine()
    served.start()
    time.sleep(0.05)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.4)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.1
    client, done = Client(), threading.Event()
    served.submit(prompt(4), SamplingParams(max_tokens=3), lambda d: (client(d), d.finish and done.set()))
    assert done.wait(30)
    served.stop()


def test_a_stop_lets_what_runs_end_and_takes_nothing_more() -> None:
    served = engine()
    clients = [ask(served, prompt(n, n), 30) for n in (3, 9)]
    served.start()
    ended = threading.Thread(target=served.stop, args=(60.0,))
    ended.start()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            ask(served, prompt(3), 1)
        except EngineDead as error:
            assert "stopping" in str(error)  # noqa: PT017
            break
    ended.join()
    assert [client.finish() for client in clients] == ["length", "length"]
    assert not served.alive
    check_empty(served)


@pytest.mark.parametrize("thread", [True, False])
def test_a_stop_without_grace_aborts(thread: bool) -> None:
    served = engine()
    client = ask(served, prompt(9), 150, n=2)
    if thread:
        served.start()
        while not client.tokens():
            time.sleep(0.001)
    else:
        served.step()
    served.stop()
    assert client.finish(0) == client.finish(1) == "abort"
    assert not served.alive
    check_empty(served)
    with pytest.raises(EngineDead, match="stopping"):
        ask(served, prompt(3))
    with pytest.raises(EngineDead, match="stopping"):
        served.start()
    served.stop()


def test_a_thread_that_dies_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    served, done = engine(), threading.Event()
    client = Client()

    def fails(*_, **__):
        raise RuntimeError("lost")

    monkeypatch.setattr(served.core.runner, "start", fails)
    served.start()
    served.submit(prompt(9), SamplingParams(), lambda delta: (client(delta), done.set()))
    assert done.wait(30)
    assert client.finish() == "error"
    deadline = time.monotonic() + 30
    while served.running and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not served.running
    assert not served.alive
    served.stop(5.0)


def test_a_client_may_abort_or_ask_again_from_its_sink() -> None:
    served, box, again = engine(), Client(), Client()

    def sink(delta) -> None:
        box(delta)
        if len(box.tokens()) == 4 and not delta.finish:
            served.abort("me")
            served.submit(prompt(3), SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), again)

    served.submit(prompt(9), SamplingParams(temperature=0.0, max_tokens=50), sink, id="me")
    drain(served)
    assert (box.finish(), len(box.tokens())) == ("abort", 4)
    assert again.tokens() == recomputed(prompt(3), 5)
