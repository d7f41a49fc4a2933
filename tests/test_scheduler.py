"""What each step holds, who waits, and what is refused.

Some are failures of DeepSpeed-MII that must not come back.
"""

import subprocess
import sys
from collections.abc import Sequence

import pytest
from fake_runner import engine, reference, request, shape

from coterie.infer.request import QueueFull, RequestError
from coterie.infer.step import PACE, Due, SchedulerConfig, Slice

POLICIES = ("splitfuse", "static", "prefill_first", "no_chunk")


def test_splitfuse_decodes_first_and_fills_up_with_prompts() -> None:
    e = engine(budget=10)
    e.add(request("a", 4))
    e.add(request("b", 13))
    e.add(request("c", 5))
    assert shape(e.step()) == [("a", 0, 4), ("b", 0, 6)]
    assert shape(e.step()) == [("a", 4, 1), ("b", 6, 7), ("c", 0, 2)]
    assert shape(e.step()) == [("a", 5, 1), ("b", 13, 1), ("c", 2, 3)]
    e.drain()


def test_only_the_end_of_what_is_known_wants_logits() -> None:
    e = engine(budget=6)
    e.add(request("a", 8))
    first, second = e.step().slices[0], e.step().slices[0]
    assert (first.wants_logits, second.wants_logits) == (False, True)
    assert e.given["a", 0] == reference(request("a", 8))[0][:1]


def test_static_is_768() -> None:
    e = engine(blocks=600, policy="static", budget=3, max_step_tokens=4096)
    e.add(request("a", 1000))
    assert [e.step().tokens, e.step().tokens] == [768, 232]


def test_a_measured_budget_is_asked_each_step() -> None:
    asked = []

    def budget(decodes: int, context: int, due: Sequence[Due]) -> int:
        asked.append((decodes, context, list(due)))
        return 9

    e = engine(budget=budget)
    e.add(request("a", 4))
    e.add(request("b", 20))
    assert [e.step().tokens, e.step().tokens] == [9, 9]
    a, b = 4 / PACE, 20 / PACE  # both came at 0, and the steps at 1 and 2
    assert asked == [(0, 0, [(4, a - 1), (24, b - 1)]), (1, 5, [(15, b - 2)])]


@pytest.mark.parametrize("answer", [0, -5, 10**9])
def test_a_budget_out_of_range_is_cut(answer: int) -> None:
    e = engine(budget=lambda decodes, context, due: answer, max_step_tokens=7)
    e.add(request("a", 9, most=2))
    assert e.step().tokens == (1 if answer < 1 else 7)
    e.drain()


def test_prefill_first_does_not_mix() -> None:
    e = engine(policy="prefill_first", max_step_tokens=20)
    e.add(request("a", 4))
    assert shape(e.step()) == [("a", 0, 4)]
    e.add(request("b", 15))
    e.add(request("c", 15))
    assert shape(e.step()) == [("b", 0, 15)], "c goes whole or not at all"
    assert shape(e.step()) == [("c", 0, 15)]
    assert [key for key, _, _ in shape(e.step())] == ["a", "b", "c"]


def test_no_chunk_mixes_whole_prompts() -> None:
    e = engine(policy="no_chunk", max_step_tokens=20)
    e.add(request("a", 4))
    e.step()
    e.add(request("b", 15))
    e.add(request("c", 15))
    assert shape(e.step()) == [("a", 4, 1), ("b", 0, 15)]
    assert shape(e.step()) == [("a", 5, 1), ("b", 15, 1), ("c", 0, 15)]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_longer_than_any_step_is_cut(policy) -> None:
    e = engine(policy=policy, max_step_tokens=8, budget=8)
    e.add(request("a", 30, most=3))
    e.drain()
    assert e.given["a", 0] == reference(request("a", 30, most=3))[0]


@pytest.mark.parametrize(
    ("prompt", "most", "settings", "message"),
    [
        (250, 8, {}, "a prompt of 250 tokens and max_tokens 8 are 258 tokens, but the cache has room for 256"),
        (90, 11, {"max_positions": 100}, "are 101 tokens, but the model has 100 positions"),
        ([1, 7], 8, {}, "the prompt has token 7, but the vocabulary has 7 tokens"),
    ],
)
def test_what_never_fits_is_refused_at_once(prompt, most: int, settings: dict, message: str) -> None:
    """In MII an assertion killed the engine for a prompt larger than the cache."""
    e = engine(**settings)
    e.add(request("a", 5))
    with pytest.raises(RequestError, match=message):
        e.add(request("big", prompt, most=most))
    e.drain()
    assert len(e.given["a", 0]) == 8


def test_what_just_fits_is_served() -> None:
    e = engine(blocks=8, size=4)
    e.add(request("a", 25, most=8))  # 33 tokens, of which the last needs no room
    e.drain()
    assert len(e.given["a", 0]) == 8


def test_more_samples_than_sequences_are_refused() -> None:
    with pytest.raises(RequestError, match="5 samples are asked for, but 4 run at most"):
        engine(max_sequences=4).add(request("a", 3, n=2, best_of=5))


def test_an_id_is_used_once_at_a_time() -> None:
    e = engine()
    first = request("a", 3)
    e.add(first)
    with pytest.raises(RequestError, match="'a' is under way"):
        e.add(request("a", 3))
    e.drain()
    with pytest.raises(RequestError, match="was added before"):
        e.scheduler.add(first)


def test_a_prompt_that_does_not_fit_now_holds_nobody_up() -> None:
    """MII stopped at the first prompt that did not fit, and could deadlock there."""
    e = engine(blocks=16, max_overtakes=2)
    e.add(request("a", 30, most=20))
    e.step()
    e.add(request("big", 50, most=4))
    for i in range(4):
        e.add(request(f"small{i}", 3, most=30 if i == 0 else 2))
    steps = [[key for key, _, _ in shape(e.step())] for _ in range(12)]
    assert all("a" in step for step in steps), "decodes go on"
    seen = {key for step in steps for key in step}
    assert seen == {"a", "small0", "small1"}, "two overtake; then the big one is waited for"
    e.drain()


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_starves_under_an_endless_stream(policy) -> None:
    """Small requests come faster than they can be served; a big one and a decode still end."""
    e = engine(blocks=16, policy=policy, budget=12, max_step_tokens=24, max_sequences=6, max_overtakes=3)
    watched = e.add(request("decode", 3, most=20))
    e.step()
    for i in range(4):
        e.add(request(f"first{i}", 9, most=4))
    watched += e.add(request("big", 40, most=8))
    for i in range(150):
        for j in range(3):
            e.add(request(f"{i}.{j}", 5, most=2))
        e.step()
    for r in watched:
        assert e.given[r.key] == reference(r)[0], f"{r.id} starves"


def test_prefill_first_lets_decodes_wait_for_so_many_steps() -> None:
    e = engine(policy="prefill_first", max_overtakes=3)
    e.add(request("a", 3, most=10))
    for i in range(40):
        e.add(request(str(i), 5, most=1))  # a prompt for every step
        e.step()
    assert len(e.given["a", 0]) == 10


def test_newcomers_leave_room_for_those_who_run() -> None:
    e = engine(blocks=32, size=1)
    e.add(request("a", 8, most=20))
    e.step()
    e.add(request("b", 23, most=4))  # it would take all that is left but one block, which `a` takes
    assert shape(e.step()) == [("a", 8, 1)]
    e.add(request("c", 21, most=4))
    assert shape(e.step()) == [("a", 9, 1), ("c", 0, 21)]
    e.drain()


def test_a_budget_below_the_decodes_serves_them_in_turn() -> None:
    e = engine(budget=lambda decodes, context, due: 2 if decodes else 8)
    for id in "abcd":
        e.add(request(id, 2, most=30))
    for _ in range(21):
        e.step()
    lengths = [len(e.given[id, 0]) for id in "abcd"]
    assert sum(lengths) == 44
    assert max(lengths) == min(lengths)


def test_thousands_of_requests_leave_nothing_behind() -> None:
    """MII's ids ran out after 9,999, and a dictionary grew with each request."""
    e = engine(max_sequences=16)
    for i in range(3_000):
        e.add(request(str(i), [1 + i % 3, 1 + i % 5], most=1 + i % 2, n=1 + i % 4))
        e.step()
        if i % 7 == 0:
            e.take(e.scheduler.abort(str(i)))
    e.drain()
    scheduler, roster = e.scheduler, e.scheduler.roster
    kept = (roster.running, roster.waiting, roster._live, roster._forks)
    assert not any(map(len, kept))
    assert scheduler.pool.free == 64
    assert scheduler.pool.cached <= 64
    assert len(e.ended) == sum(1 + i % 4 for i in range(3_000))


def test_idle_says_so() -> None:
    """MII span while it had nothing to do: the engine sleeps while `busy` is false."""
    e = engine()
    assert not e.scheduler.busy
    assert e.schedule().slices == ()


def test_steps_are_taken_in_turn() -> None:
    e = engine()
    e.add(request("a", 5))
    step = e.schedule()
    with pytest.raises(RuntimeError, match="neither committed nor rolled back"):
        e.scheduler.schedule(0.0)
    e.scheduler.commit(step, e.runner.run(step))
    for late in (e.scheduler.rollback, lambda step: e.scheduler.commit(step, {})):
        with pytest.raises(RuntimeError, match="is not the one under way"):
            late(step)


def test_the_queue_is_bounded() -> None:
    e = engine(max_sequences=1, max_queued_requests=3, max_queued_tokens=20)
    e.add(request("a", 5))
    e.step()
    e.add(request("b", 15))
    with pytest.raises(QueueFull, match="15 tokens wait, and at most 20 may"):
        e.add(request("c", 6))
    e.add(request("c", 1))
    e.add(request("d", 1))
    with pytest.raises(QueueFull, match="3 sequences wait, and at most 3 may"):
        e.add(request("e", 1))
    e.drain()
    e.add(request("f", 100))  # nobody waits: what fits the cache is taken
    e.drain()


def test_a_storm_in_a_small_pool() -> None:
    """Every mechanism at once; what is counted shows that each was at work."""
    for policy in POLICIES:
        e = engine(blocks=20, policy=policy, budget=9, max_step_tokens=17, max_sequences=7, guess=2)
        samples, copies, chunks = [], 0, 0
        for i in range(60):
            samples += e.add(
                request(str(i % 13) + "." + str(i), [1 + i % 2] * (1 + i * 7 % 29), 1 + i % 24, n=1 + i % 3)
            )
            for _ in range(i % 4):
                step = e.step()
                copies += len(step.copies)
                chunks += sum(not piece.wants_logits for piece in step.slices)
        e.drain()
        for r in samples:
            assert e.given[r.key] == reference(r)[0]
        roster, pool = e.scheduler.roster, e.scheduler.pool
        assert min(roster.preemptions, copies, pool.hit, pool.evicted) > 0
        assert chunks > 0


def test_settings_that_mean_nothing_are_refused() -> None:
    for settings in (
        {"policy": "fifo"},
        {"budget": 0},
        {"max_sequences": 0},
        {"lookahead": 0},
        {"max_overtakes": -1},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} .* (must be|is not one of) "):
            SchedulerConfig(**settings)


def test_no_torch_is_needed() -> None:
    code = "import coterie.infer.scheduler, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_slice_names_blocks_for_all_its_positions() -> None:
    e = engine(budget=5)
    e.add(request("a", 11, most=4))
    while e.scheduler.busy:
        piece: Slice = e.step().slices[0]
        assert len(piece.blocks) * 4 >= piece.start + len(piece.tokens)


def test_guesses_leave_room_for_prompts() -> None:
    """Eight sequences with four guesses each could fill every step."""
    running = engine(blocks=256, guess=4, budget=40)
    for i in range(8):
        running.add(request(f"r{i}", 3, 200))
    for _ in range(4):
        running.step()
    late = running.add(request("late", 60, 1))[0]
    for _ in range(8):
        running.step()
    assert late.finish == "length"
