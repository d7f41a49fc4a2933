"""A sequence's way: preempted, ended, aborted, guessed, cached, forked.

Some are failures of DeepSpeed-MII that must not come back.
"""

import pytest
from fake_runner import VOCABULARY, engine, reference, request, shape

from coterie.infer.request import Request, SamplingParams, State
from coterie.infer.step import Result

POLICIES = ("splitfuse", "static", "prefill_first", "no_chunk")


@pytest.mark.parametrize("policy", POLICIES)
def test_preemption_takes_the_youngest_and_loses_no_token(policy) -> None:
    """MII resumed with prompt + generated as the prompt: the generated part vanished, and the length was wrong."""
    e = engine(blocks=6, policy=policy)
    old, young = e.add(request("old", 7, most=12)) + e.add(request("young", 7, most=12))
    preempted = []
    while e.scheduler.busy:
        before = list(young.generated)
        step = e.step()
        preempted += step.preempted
        if ("young", 0) in step.preempted:
            assert young.state is State.WAITING
            assert young.generated == before != []
            assert len(young.prompt) == 7
    assert preempted
    assert set(preempted) == {("young", 0)}
    assert young.preemptions == len(preempted) == e.scheduler.roster.preemptions
    for r in (old, young):
        assert (e.given[r.key], r.generated_length) == (reference(r)[0], 12)


def test_preemption_at_every_step_changes_nothing() -> None:
    e = engine()
    r = e.add(request("a", 9, most=20))[0]
    while e.scheduler.busy:
        e.step()
        if e.scheduler.busy:
            e.scheduler.roster.preempt(r)
            assert e.scheduler.pool.used == 0
    assert e.given[r.key] == reference(r)[0]


def test_min_tokens_does_not_count_the_prompt() -> None:
    """MII compared it with the length of prompt and answer together."""
    for least in range(1, 30):
        r = Request("a", (1, 2, 1, 2, 2) * 8, SamplingParams(max_tokens=30, min_tokens=least))
        e = engine()
        e.add(r)
        e.drain()
        assert least <= r.generated_length
        assert e.given[r.key] == reference(r)[0]


def test_every_stop_token_stops_and_is_named() -> None:
    """MII passed the first stop only."""
    tokens = reference(request("a", 5, most=20))[0]
    for stops in ((tokens[6],), (99, tokens[6]), (tokens[6], 99)):
        e = engine(vocabulary=100)
        e.add(request("a", 5, most=20, stop_token_ids=stops))
        e.drain()
        end = e.ended["a", 0]
        assert (end.finish, end.stop_token) == ("stop", tokens[6])
        assert e.given["a", 0] == tokens[: tokens.index(tokens[6]) + 1]


def test_the_text_layer_ends_a_sequence_at_a_stop_string() -> None:
    e = engine()
    e.add(request("a", 5, most=20))
    e.step()
    event = e.scheduler.finish(("a", 0), "stop")
    assert event
    assert (event.finish, event.tokens, event.stop_token) == ("stop", (), None)
    assert e.scheduler.finish(("a", 0), "stop") is None
    assert e.scheduler.pool.used == 0


def test_a_failed_sequence_is_the_only_one() -> None:
    e = engine()
    for id in "abc":
        e.add(request(id, 5))
    step = e.schedule()
    results = e.runner.run(step)
    results["a", 0] = Result(0, error="its grammar allows nothing")
    del results["b", 0]
    e.take(e.scheduler.commit(step, results))
    assert (e.ended["a", 0].finish, e.ended["a", 0].error) == ("error", "its grammar allows nothing")
    assert e.ended["b", 0].error == "the runner gave no token"
    e.drain()
    assert e.given["c", 0] == reference(request("c", 5))[0]


def test_a_step_that_fails_as_a_whole_is_computed_again() -> None:
    e = engine(budget=5)
    e.add(request("a", 9, n=3))
    fails = 0
    while e.scheduler.busy:
        step = e.schedule()
        if fails < 20 and step.number % 3 == 0:
            fails += 1
            e.scheduler.rollback(step)
        else:
            e.take(e.scheduler.commit(step, e.runner.run(step)))
    assert fails
    for i in range(3):
        assert len(e.given["a", i]) == 8


@pytest.mark.parametrize(
    ("phase", "steps"), [("mid-prompt", 1), ("forking", 2), ("forked", 3), ("decoding", 4), ("last step", 5)]
)
@pytest.mark.parametrize("between", [False, True])
def test_an_abort_frees_all_at_once(phase: str, steps: int, between: bool) -> None:
    """`between`: after `schedule`, when the runner already works on the step."""
    e = engine(budget=4)
    e.add(request("a", 9, most=4, n=3))
    for _ in range(steps):
        e.step()
    step = e.schedule() if between else None
    events = e.scheduler.abort("a")
    assert [(event.key[1], event.finish) for event in events] == [(i, "abort") for i in range(3)]
    assert e.scheduler.pool.used == 0
    assert not e.scheduler.busy
    assert e.scheduler.abort("a") == []
    e.add(request("a", 9, most=4))  # the name is free again, even now
    if step:
        assert e.scheduler.commit(step, e.runner.run(step, owned=False)) == []
    e.drain()
    assert e.given["a", 0] == reference(request("a", 9, most=4))[0]


def test_an_abort_of_one_that_waits_or_has_ended() -> None:
    e = engine(max_sequences=1)
    for id in "ab":
        e.add(request(id, 5))
    e.step()
    e.take(e.scheduler.abort("b"))
    assert e.scheduler.roster.waiting == []
    e.drain()
    assert e.scheduler.abort("a") == e.scheduler.abort("nobody") == []
    assert len(e.given["a", 0]) == 8


def test_a_deadline_ends_queued_and_running() -> None:
    e = engine(max_sequences=1)
    for id in "ab":
        r = request(id, 5, most=50)
        r.deadline = 4.0
        e.add(r)
    e.add(request("c", 5))
    for _ in range(4):
        e.step()
    assert {key[0]: end.finish for key, end in e.ended.items()} == {"a": "deadline", "b": "deadline"}
    assert len(e.given["a", 0]) == 3
    e.drain()


def test_guesses_change_nothing_but_the_number_of_steps() -> None:
    plain, guessing = engine(), engine(guess=4)
    for e in (plain, guessing):
        for id in "abc":
            e.add(request(id, 7, most=40))
    steps = plain.drain(), guessing.drain()
    assert plain.given == guessing.given
    assert steps[1] < 0.7 * steps[0]


def test_guesses_fit_into_max_tokens_and_the_budget() -> None:
    e = engine(guess=4, budget=6)
    for id in "abc":
        e.add(request(id, 2, most=5))
    while e.scheduler.busy:
        step = e.step()
        for piece in step.slices:
            assert piece.start + len(piece.tokens) <= 2 + 5 - 1
    assert all(len(tokens) == 5 for tokens in e.given.values())


def test_blocks_of_rejected_guesses_are_free_after_the_commit() -> None:
    e = engine(size=1)
    e.add(request("a", 3))
    step = e.schedule()
    token = e.runner.run(step)["a", 0].token
    wrong = tuple((token + i) % VOCABULARY for i in range(1, 5))
    e.take(e.scheduler.commit(step, {("a", 0): Result(token, 0, wrong)}))
    step = e.schedule()
    assert (step.slices[0].drafts, e.scheduler.pool.used) == (4, 8)
    results = e.runner.run(step)
    e.take(e.scheduler.commit(step, results))
    assert e.scheduler.pool.used == 4 + results["a", 0].accepted
    bad = e.schedule()
    e.take(e.scheduler.commit(bad, {("a", 0): Result(1, accepted=9)}))
    assert e.ended["a", 0].error == "the runner accepted 9 of 0 guesses"


def test_guesses_take_no_block_from_another() -> None:
    e = engine(blocks=4, size=4, guess=4)
    for id in "ab":
        e.add(request(id, 7, most=3 if id == "b" else 9))
    e.step()
    step = e.step()
    assert shape(step) == [("a", 7, 1), ("b", 7, 1)], "the guesses would need a third block"
    assert step.preempted == ()
    e.drain()


def test_the_preempted_come_before_the_younger() -> None:
    e = engine()
    for id in "abc":
        e.add(request(id, 5))
        if id != "c":
            e.step()
    for id in "ba":
        r = e.scheduler.get((id, 0))
        assert r
        e.scheduler.roster.preempt(r)
    assert [r.id for r in e.scheduler.roster.waiting] == ["a", "b", "c"]
    e.drain()


def test_a_cached_prompt_computes_its_last_token_only() -> None:
    e = engine()
    prompt = (1, 2, 3, 4) * 4
    for id, salt, tokens in (("a", "x", 16), ("b", "x", 1), ("c", "y", 16)):
        r = Request(id, prompt, SamplingParams(max_tokens=2, ignore_eos=True), salt=salt)
        e.add(r)
        assert e.step().tokens == tokens, f"{id} with salt {salt}"
        e.drain()
        assert e.given[id, 0] == e.given["a", 0]
        assert r.cached == 16 - tokens
    assert (e.scheduler.pool.queried, e.scheduler.pool.hit) == (48, 15)


def test_an_answer_is_cached_for_the_next_turn() -> None:
    e = engine()
    first = request("a", 8, most=9)
    e.add(first)
    e.drain()
    e.add(request("b", [*first.tokens[:16], 3, 3]))
    assert shape(e.step()) == [("b", 16, 2)]


def test_samples_share_the_prompt() -> None:
    e = engine(size=4)
    e.add(request("a", 10, n=3))
    assert e.step().tokens == 10
    assert e.scheduler.pool.used == 3
    step = e.step()
    assert [(piece.key[1], piece.start, len(piece.tokens)) for piece in step.slices] == [
        (1, 9, 1),
        (2, 9, 1),
        (0, 10, 1),
    ]
    assert len(step.copies) == 2, "the last to write keeps the block"
    assert e.scheduler.pool.used == 5
    e.drain()
    answers = [e.given["a", i] for i in range(3)]
    assert len(set(map(tuple, answers))) == 3


def test_samples_go_on_when_the_first_ends_before_its_prompt_is_computed() -> None:
    e = engine(budget=4)
    e.add(request("a", 10, n=3))
    e.step()
    event = e.scheduler.finish(("a", 0), "stop")
    assert event
    e.take([event])
    e.drain()
    assert [len(e.given["a", i]) for i in range(3)] == [0, 8, 8]
