"""Which replica computes a request: never one that is gone, the least loaded, or the one that knows the prompt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.serve.routing import Ask, Router, asked

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def _ask(prompt: Any, salt: str = "", **body: Any) -> Ask:
    return asked(COMPLETIONS, {"prompt": prompt, **body}, salt)


@settings(deadline=None)
@given(st.data(), st.integers(1, 5))
def test_only_those_that_are_there_and_counts_return_to_zero(data: st.DataObject, count: int) -> None:
    router = Router(count, remember=8)
    open_: list[tuple[int, Ask]] = []
    expected = [0] * count
    for _ in range(data.draw(st.integers(0, 30))):
        what = data.draw(st.sampled_from(["pick", "end", "forget"]))
        if what == "pick":
            ask = Ask(data.draw(st.integers(1, 1000)), tuple(data.draw(st.lists(st.binary(max_size=1), max_size=4))))
            among = data.draw(st.sets(st.integers(0, count - 1)))
            chosen = router.pick(ask, among)
            assert (chosen in among) if among else chosen is None
            if chosen is not None:
                open_.append((chosen, ask))
                expected[chosen] += ask.tokens
        elif what == "end" and open_:
            chosen, ask = open_.pop(data.draw(st.integers(0, len(open_) - 1)))
            router.end(chosen, ask)
            expected[chosen] -= ask.tokens
        elif what == "forget":
            router.forget(data.draw(st.integers(0, count - 1)))
        assert router.outstanding == expected
        assert len(router._favourites) <= 8
    for chosen, ask in open_:
        router.end(chosen, ask)
    assert router.outstanding == [0] * count


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_equals_take_turns(count: int, rounds: int, ending: bool) -> None:
    router, seen = Router(count), [0] * count
    for _ in range(count * rounds):
        chosen = router.pick(Ask(7), range(count))
        assert chosen is not None
        seen[chosen] += 1
        if ending:
            router.end(chosen, Ask(7))
    assert seen == [rounds] * count


@settings(deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=6), st.integers(1, 10_000))
def test_a_prompt_that_nobody_knows_goes_to_the_least_loaded(loads: list[int], tokens: int) -> None:
    router = Router(len(loads))
    router.outstanding = list(loads)
    chosen = router.pick(Ask(tokens, (b"a",)), range(len(loads)))
    assert chosen is not None
    assert loads[chosen] == min(loads)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 2000))
def test_a_known_prompt_follows_until_its_replica_has_too_much(favourite: int, other: int, tokens: int) -> None:
    router = Router(2)
    first = router.pick(Ask(tokens, (b"a", b"ab")), [0])
    assert first == 0
    router.outstanding = [favourite, other]
    bound = favourite <= 1.25 * min(favourite, other) + 2 * tokens
    chosen = router.pick(Ask(tokens, (b"a", b"ac")), [0, 1])
    assert chosen == (0 if bound else 1)


def test_the_longest_known_beginning_counts_and_a_dead_replica_knows_none() -> None:
    router = Router(3)
    router.pick(Ask(1, (b"a", b"ab")), [1])
    router.pick(Ask(1, (b"a", b"ac")), [2])
    router.outstanding = [0, 0, 0]
    assert router.pick(Ask(1, (b"a", b"ab", b"abc")), [0, 1, 2]) == 1
    assert router.pick(Ask(1, (b"a", b"ac", b"acd")), [0, 1, 2]) == 2
    router.forget(2)
    router.outstanding = [0, 5, 5]
    assert router.pick(Ask(1, (b"x", b"ac", b"acd")), [0, 1, 2]) == 0


def test_beginnings_are_shared_by_prompts_of_one_salt_alone() -> None:
    same = "the cat sat on the mat and " * 40
    one, other = _ask(same + "slept"), _ask(same + "purred")
    assert len(one.beginnings) == 5  # 64 to 1024 characters
    assert one.beginnings == other.beginnings
    assert not set(one.beginnings) & set(_ask(same, "salt").beginnings)
    assert not set(one.beginnings) & set(_ask("A" + same).beginnings)
    assert _ask([*range(200), 1]).beginnings == _ask([*range(200), 2]).beginnings
    assert len(_ask("a" * 10**6).beginnings) == 11
    assert _ask("short").beginnings == ()
    messages = [{"role": "user", "content": same}]
    first = asked(CHAT, {"messages": messages}, "")
    assert first.beginnings == asked(CHAT, {"messages": [*messages, {"role": "user", "content": "b"}]}, "").beginnings


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "a" * 40}, 11 + 16),
        ({"prompt": [1] * 30, "max_tokens": 5}, 35),
        ({"prompt": [[1] * 30, [2] * 10], "max_tokens": 5, "n": 3}, 40 + 30),
        ({"prompt": ["a" * 4, "b" * 8], "best_of": 2, "n": 1, "max_tokens": 10}, 2 + 3 + 40),
        ({"prompt": "", "max_tokens": -4, "n": True}, 1 + 16),
        ({"prompt": 10**400}, 101 + 16),
        ({"prompt": "a", "max_tokens": 10**30, "n": 10**30}, 1 << 30),
        ({"prompt": []}, 0 + 16),
        ({}, 4 + 16),
    ],
)
def test_tokens_are_estimated_whatever_the_body_says(body: dict[str, Any], tokens: int) -> None:
    assert asked(COMPLETIONS, body, "").tokens == tokens


def test_a_chat_without_a_length_counts_as_one_of_some() -> None:
    assert asked(CHAT, {"messages": []}, "").tokens > 256
    assert asked(CHAT, {"messages": [], "max_completion_tokens": 3}, "").tokens < 20


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_nothing_that_a_client_sends_breaks_it(value: Any) -> None:
    for name in ("prompt", "messages", "max_tokens", "n", "tools"):
        assert asked(COMPLETIONS, {name: value}, "").tokens >= 0
