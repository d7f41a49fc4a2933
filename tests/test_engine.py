"""The engine: what its clients get, and that one request's trouble stays its own."""

import math
import time

import pytest
import torch
from engines import CONFIG, Client, alone, ask, check_empty, drain, engine, model, prompt, recomputed, tokenizer

from coterie.infer.counter import seed_of_choice
from coterie.infer.outputs import StepReport
from coterie.infer.request import EngineDead, QueueFull, RequestError, SamplingParams
from coterie.infer.sample_state import SampleState


def test_many_requests_together_give_what_each_gives_alone() -> None:
    served = engine()
    prompts = [prompt(n, n) for n in (1, 3, 17, 40, 100)]
    clients = [ask(served, ids) for ids in prompts]
    drain(served)
    for ids, client in zip(prompts, clients, strict=True):
        assert client.tokens() == recomputed(ids)
        assert client.finish() == "length"


def test_samples_of_a_request_are_those_of_their_own_seeds() -> None:
    served = engine()
    client = ask(served, prompt(9), n=4, temperature=1.5, seed=7)
    drain(served)
    texts = [client.tokens(i) for i in range(4)]
    assert texts == [alone(prompt(9), temperature=1.5, seed=seed_of_choice(7, i)) for i in range(4)]
    assert len(set(map(tuple, texts))) == 4


def test_requests_without_a_seed_differ_and_an_engine_may_have_one() -> None:
    def two(seed: int) -> list[list[int]]:
        served = engine(seed=seed)
        clients = [ask(served, prompt(5), temperature=2.0) for _ in range(2)]
        drain(served)
        return [client.tokens() for client in clients]

    first, second = two(0)
    assert first != second
    assert two(3) == two(3) != two(4)


def test_the_best_of_several_are_kept() -> None:
    served = engine()
    every = ask(served, prompt(6), n=5, temperature=1.5, seed=3, logprobs=0)
    drain(served)
    best = ask(served, prompt(6), n=2, best_of=5, temperature=1.5, seed=3)
    drain(served)
    worth = {i: sum(o.logprob for d in every.deltas[i] for o in d.logprobs) for i in range(5)}
    ranked = sorted(worth, key=worth.__getitem__, reverse=True)
    assert [best.tokens(i) for i in range(2)] == [every.tokens(i) for i in ranked[:2]]
    assert sorted(best.deltas) == [0, 1]
    assert all(len(parts) == 1 and not parts[0].logprobs for parts in best.deltas.values())


def test_log_probabilities_and_routes_are_those_of_a_plain_pass() -> None:
    served = engine()
    client = ask(served, prompt(20), 6, logprobs=3, routes=True, temperature=1.0, seed=1)
    other = ask(served, prompt(11, 2), 6)
    drain(served)
    whole = [*prompt(20), *client.tokens()]
    with torch.inference_mode():
        out = model()(torch.tensor([whole]))
    assert out.logits_BSV is not None
    expected_SV = out.logits_BSV[0].log_softmax(-1)
    told = [one for delta in client.deltas[0] for one in delta.logprobs]
    routes = [one for delta in client.deltas[0] for one in delta.routes]
    assert len(told) == len(routes) == 6
    for i, (one, layers) in enumerate(zip(told, routes, strict=True)):
        at = 19 + i
        assert one.token == whole[at + 1]
        assert math.isclose(one.logprob, float(expected_SV[at, one.token]), abs_tol=1e-4)
        assert [token for token, _ in one.top] == expected_SV[at].topk(3).indices.tolist()
        assert [list(ids) for ids in layers] == [ids_TK[at].tolist() for ids_TK in out.routes]
    assert not other.deltas[0][0].logprobs
    assert not other.deltas[0][0].routes


def test_a_stop_string_ends_the_text_wherever_it_lies() -> None:
    served = engine(text=True)
    whole = ask(served, prompt(8), 40)
    drain(served)
    text = whole.text()
    assert text == tokenizer().decode([*prompt(8), *whole.tokens()])[len(tokenizer().decode(prompt(8))) :]
    for start, end in ((3, 6), (10, 11), (12, 19)):
        stop = text[start:end]
        client = ask(served, prompt(8), 40, stop=("never said", stop))
        drain(served)
        assert client.text() == text[: text.index(stop)]
        assert (client.finish(), client.last().stop) == ("stop", stop)
        assert client.tokens() == whole.tokens()[: len(client.tokens())]
        assert stop in tokenizer().decode(client.tokens())
        assert stop not in tokenizer().decode(client.tokens()[:-1])


def test_text_that_was_held_back_comes_at_the_end() -> None:
    served = engine(text=True)
    whole = ask(served, prompt(8), 12)
    drain(served)
    client = ask(served, prompt(8), 12, stop=(whole.text()[-4:] + "zq",))
    drain(served)
    assert client.text() == whole.text()
    assert client.finish() == "length"


def test_what_ends_a_text() -> None:
    served = engine(text=True)
    free = ask(served, prompt(8), 30)
    drain(served)
    tokens = free.tokens()
    stop = tokens[7]
    first = tokens.index(stop)
    client = ask(served, prompt(8), 30, stop_token_ids=(stop,))
    drain(served)
    assert client.tokens() == tokens[: first + 1]
    assert (client.finish(), client.last().stop) == ("stop", stop)
    assert client.text() == free.text()[: len(client.text())]
    assert client.text() == tokenizer().decode([*prompt(8), *tokens[:first]])[len(tokenizer().decode(prompt(8))) :]


@pytest.mark.parametrize("how", ["end of text", "special stop string"])
def test_the_end_of_a_text_counts_after_min_tokens(how: str) -> None:
    """The prompt does not count, though MII's does."""
    served, end = engine(text=True), tokenizer().eos_id
    sure = ((end, 100.0),)
    settings = {"ignore_eos": False} if how == "end of text" else {"ignore_eos": True, "stop": ("<|endoftext|>",)}
    for least in (0, 1, 5):
        client = ask(served, prompt(30), 9, min_tokens=least, logit_bias=sure, **settings)
        drain(served)
        assert client.tokens()[least:] == [end]
        assert end not in client.tokens()[:least]
        assert client.finish() == "stop"
        assert client.last().stop == (None if how == "end of text" else "<|endoftext|>")
    client = ask(served, prompt(30), 9, logit_bias=sure, ignore_eos=True)
    drain(served)
    assert client.tokens() == [end] * 9
    assert client.text() == ""


def test_penalties_remember_what_was_said() -> None:
    served = engine()
    plain = ask(served, prompt(4), 40)
    lowered = ask(served, prompt(4), 40, frequency_penalty=2.0, repetition_penalty=50.0)
    drain(served)
    assert max(map(plain.tokens().count, plain.tokens())) > 1
    assert len(set(lowered.tokens())) == 40


class Grammar:
    """Allows the given tokens in turn, then anything; 0 allows nothing, -1 raises."""

    def __init__(self, *tokens: int, refuses: int = -1) -> None:
        self.tokens, self.refuses = tokens, refuses

    def start(self) -> "Grammar":
        return Grammar(*self.tokens, refuses=self.refuses)

    done = False

    def mask(self) -> torch.Tensor:
        mask = torch.ones(CONFIG.vocab_size, dtype=torch.bool)
        if self.tokens:
            if self.tokens[0] < 0:
                raise ValueError("a broken grammar")
            mask[:] = False
            mask[self.tokens[0]] = self.tokens[0] > 0
        return mask

    def accept(self, token: int) -> None:
        if token == self.refuses:
            raise ValueError("this token is not in the grammar")
        self.tokens = self.tokens[1:]


def test_a_grammar_rules_its_own_request_alone() -> None:
    served = engine()
    bound = ask(served, prompt(7), grammar=Grammar(5, 6, 7), n=2, temperature=1.0, seed=1)
    free = ask(served, prompt(7))
    nothing = ask(served, prompt(7), grammar=Grammar(5, 0))
    broken = ask(served, prompt(7), grammar=Grammar(5, -1))
    late = ask(served, prompt(7), grammar=Grammar(5, 6, refuses=6))
    drain(served)
    assert bound.tokens(0)[:3] == bound.tokens(1)[:3] == [5, 6, 7]
    assert free.tokens() == recomputed(prompt(7))
    assert [one.finish() for one in (nothing, broken, late)] == ["error"] * 3
    assert nothing.tokens() == broken.tokens() == [5]
    assert "no token is allowed" in str(nothing.last().error)
    assert "a broken grammar" in str(broken.last().error)
    assert late.last().error


def test_logits_that_are_no_numbers_fail_their_own_request() -> None:
    served, bad = engine(), 299
    weight = model().embed.weight
    kept = weight[bad].clone()
    try:
        with torch.no_grad():
            weight[bad] = math.nan
        for settings in ({}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "top_p": 0.9, "seed": 1}):
            good = ask(served, prompt(9), **settings)
            lost = ask(served, [1, 2, bad, 3], **settings)
            drain(served)
            assert good.finish() == "length"
            assert (lost.finish(), lost.tokens()) == ("error", [])
            assert "logits are not finite" in str(lost.last().error)
    finally:
        with torch.no_grad():
            weight[bad] = kept
    # What the broken rows left in their blocks reaches nobody.
    again = ask(served, prompt(40, 3))
    drain(served)
    assert again.tokens() == recomputed(prompt(40, 3))


def test_a_sink_that_raises_ends_its_request_alone() -> None:
    served, calls = engine(), []

    def sink(delta) -> None:
        calls.append(delta)
        raise OSError("the client has gone")

    served.submit(prompt(5), SamplingParams(max_tokens=50), sink)
    good = ask(served, prompt(9))
    drain(served)
    assert len(calls) == 1
    assert good.tokens() == recomputed(prompt(9))


def test_text_that_cannot_be_made_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from coterie.infer.stops import StoppingText

    served = engine(text=True)
    bad, good = ask(served, prompt(5), seed=1), ask(served, prompt(9))
    marked = served.core.live[bad.id, 0].text
    push = StoppingText.push

    def broken(self, token: int) -> str:
        if self is marked:
            raise RuntimeError("a secret path")
        return push(self, token)

    monkeypatch.setattr(StoppingText, "push", broken)
    drain(served)
    assert bad.finish() == "error"
    assert "secret" not in str(bad.last().error)
    assert good.tokens() == recomputed(prompt(9))


def test_a_step_that_fails_once_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine()
    clients = [ask(served, prompt(n, n), n=2, temperature=1.0, seed=5) for n in (3, 30, 90)]
    run, calls = served.core.runner.start, 0

    def shaky(*args, **kwargs):
        nonlocal calls
        calls += 1
        ran = run(*args, **kwargs)
        if calls in (1, 4, 9):
            raise MemoryError("not now")
        return ran

    monkeypatch.setattr(served.core.runner, "start", shaky)
    drain(served)
    for n, client in zip((3, 30, 90), clients, strict=True):
        for i in range(2):
            assert client.tokens(i) == alone(prompt(n, n), temperature=1.0, seed=seed_of_choice(5, i))


def _broken(*_, **__):
    raise RuntimeError("the device is lost")


def test_an_engine_that_dies_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine()
    clients = [ask(served, prompt(9), n=2), ask(served, prompt(4))]
    served.step()
    monkeypatch.setattr(served.core.runner, "start", _broken)
    served.step()
    with pytest.raises(RuntimeError, match="the device is lost"):
        served.step()
    assert [c.finish(i) for c, i in ((clients[0], 0), (clients[0], 1), (clients[1], 0))] == ["error"] * 3
    assert "lost" not in str(clients[0].last().error)
    assert not served.alive
    assert isinstance(served.failure, RuntimeError)
    with pytest.raises(EngineDead, match="has failed"):
        ask(served, prompt(3))
    check_empty(served)
    served.stop()


def test_an_interrupt_between_steps_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine()
    client = ask(served, prompt(20))
    served.step()
    run = served.core.runner.start

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(served.core.runner, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        served.step()
    monkeypatch.setattr(served.core.runner, "start", run)
    drain(served)
    assert client.tokens() == recomputed(prompt(20))


def test_deadlines() -> None:
    served = engine()
    late = ask(served, prompt(5), 100, deadline=time.monotonic() - 1)
    soon = ask(served, prompt(5), 140, deadline=time.monotonic() + 0.03)
    drain(served)
    assert (late.finish(), late.tokens()) == ("deadline", [])
    assert soon.finish() == "deadline"
    assert soon.tokens() == recomputed(prompt(5), len(soon.tokens()))


@pytest.mark.parametrize(
    ("ids", "settings", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 161, {}, "161 tokens"),
        ([1] * 150, {"tokens": 20}, "170 tokens, but the model has 160 positions"),
        ([300], {}, "token 300, but the vocabulary has 300"),
        ([-1], {}, "the prompt's token"),
        (["a"], {}, "the prompt's token"),
        ([1], {"stop_token_ids": (300,)}, "stop_token_ids names token 300"),
        ([1], {"logit_bias": ((301, 1.0),)}, "logit_bias names token 301"),
        ([1], {"stop": ("x",)}, "need a tokenizer"),
        ([1], {"n": 120}, "120 samples are asked for, but 100 run"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(ids: list, settings: dict, words: str) -> None:
    served = engine(max_sequences=100)
    with pytest.raises(RequestError, match=words):
        ask(served, ids, **settings)
    assert served.idle
    check_empty(served)


def test_two_requests_of_one_id_and_a_full_queue_are_refused() -> None:
    served = engine(max_queued_requests=2, max_sequences=1)
    first = ask(served, prompt(3), id="a")
    with pytest.raises(RequestError, match="under way"):
        ask(served, prompt(3), id="a")
    ask(served, prompt(3))
    with pytest.raises(QueueFull, match="2 sequences wait"):
        ask(served, prompt(3))
    drain(served)
    assert first.finish() == "length"
    assert ask(served, prompt(3), id="a").id == "a"
    drain(served)


def test_a_cache_too_small_for_one_sequence_is_told() -> None:
    with pytest.raises(ValueError, match="holds keys and values of 40 tokens, but one sequence may have 160"):
        engine(blocks=10, max_model_len=160)
    with pytest.raises(ValueError, match="max_model_len 161 is over the model's 160 positions"):
        engine(max_model_len=161)
    assert engine().core.pool.count == 128 * 10


def test_prefixes_are_shared_within_a_salt_alone() -> None:
    def cached(served, salt: str) -> int:
        client = ask(served, prompt(41), salt=salt)
        drain(served)
        assert client.tokens() == recomputed(prompt(41))
        return client.last().cached

    served = engine()
    assert [cached(served, salt) for salt in ("a", "a", "b", "a", "b", "")] == [0, 40, 0, 40, 40, 0]
    assert (served.report()["prefix_hits"], served.report()["prefix_queries"]) == (120, 246)
    served = engine(prefix_cache=False)
    assert [cached(served, "a") for _ in range(3)] == [0, 0, 0]


def test_who_watches_sees_each_step() -> None:
    served, reports = engine(budget=16), []
    unwatch = served.watch(reports.append)
    served.watch(_broken)
    clients = [ask(served, prompt(n, n), n=2) for n in (5, 37)]
    drain(served)
    assert [r.number for r in reports] == list(range(1, len(reports) + 1))
    assert sum(r.generated for r in reports) == sum(len(c.tokens(i)) for c in clients for i in range(2)) == 48
    for report in reports:
        assert [len(layer) for layer in report.loads] == [4, 8]
        assert all(sum(layer) == report.tokens * 2 for layer in report.loads)
        assert all(0 < count <= len(layer) for count, layer in zip(report.distinct, report.loads, strict=True))
        assert report.decodes + report.prompts > 0
        assert report.blocks_used <= report.blocks
    assert reports[0].prompts == 2
    assert reports[-1].prompts == 0
    unwatch()
    ask(served, prompt(3))
    drain(served)
    assert reports[-1].running == 0


def test_no_step_reads_faster_than_memory_does() -> None:
    served, reports = engine(), []
    served.watch(reports.append)
    served.core.runner.memory_rate = 1.0  # as a busy machine may find it
    ask(served, prompt(30))
    drain(served)
    assert 0 < min(r.roofline for r in reports) < max(r.roofline for r in reports) == 1
    assert served.core.runner.memory_rate > 1e5
    served.core.runner.memory_rate = 0.0
    ask(served, prompt(3))
    drain(served)
    assert reports[-1].roofline == 0


def test_nothing_global_moves() -> None:
    state = torch.get_rng_state()
    served = engine()
    ask(served, prompt(4), temperature=1.0)
    drain(served)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_inference_mode_enabled()


def test_a_state_counts_its_own_tokens() -> None:
    settings = SamplingParams(min_tokens=2, stop_token_ids=(4,), presence_penalty=1.0)
    state = SampleState.of([1, 2], settings, seed=1, eos_ids=(0, 4))
    assert state.row(1).banned == (4, 0)
    assert state.row(1, (9,)).banned == ()
    assert state.row(1, (9,)).position == 2
    state.take([7, 7])
    assert state.history is not None
    assert state.history.pairs()[1].tolist() == [0, 0, 2]


def test_a_client_never_hears_of_another() -> None:
    served = engine()
    clients = {f"r{i}": Client() for i in range(6)}
    for i, (id, client) in enumerate(clients.items()):
        served.submit(prompt(i + 1), SamplingParams(max_tokens=5, n=1 + i % 3), client, id=id)
    drain(served)
    for id, client in clients.items():
        assert {delta.key[0] for parts in client.deltas.values() for delta in parts} == {id}


def test_clients_are_told_while_the_next_step_computes() -> None:
    """A stop string is then found when the sequence is in a step already: its token is lost and nothing else."""

    def ended(overlaps: bool) -> tuple[list[str], list[list[int]]]:
        served = engine(text=True, budget=20)
        served.core.overlaps = overlaps
        reports: list[StepReport] = []
        served.watch(reports.append)
        whole = ask(served, prompt(8), 40)
        drain(served)
        stops = [whole.text()[start : start + 3] for start in (4, 9, 15)]
        clients = [ask(served, prompt(8), 40, stop=(stop,)) for stop in stops] + [ask(served, prompt(30), 9)]
        drain(served)
        assert [client.finish() for client in clients] == ["stop"] * 3 + ["length"]
        assert sum(report.prompts for report in reports) >= 5
        return [client.text() for client in clients], [client.tokens() for client in clients]

    assert ended(True) == ended(False)


def test_clients_are_told_when_no_step_follows() -> None:
    served = engine()
    served.core.overlaps = True
    client = ask(served, prompt(5), 3)
    served.start()
    end = time.monotonic() + 30
    while client.finish() is None and time.monotonic() < end:
        time.sleep(0.01)
    served.stop()
    assert client.finish() == "length"
    assert len(client.tokens()) == 3
