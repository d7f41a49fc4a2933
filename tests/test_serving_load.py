"""Workloads: bounds, means, seeds that repeat, prompts that share nothing."""

import json
import random
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.benchmarks.serving_load import LONGEST, SHORTEST, Lengths, Load, Workload, arrivals, bodies, runs

LOAD = Load("http://127.0.0.1:1")


@given(st.integers(1, 3000), st.floats(0, 5000), st.integers(0, 99))
def test_normal_lengths_keep_their_bounds(mean: int, sd: float, seed: int) -> None:
    length = Lengths(f"{mean}:{sd}", "prompt").draw(random.Random(seed))
    assert length == mean if not sd else 2 <= length <= max(2, 3 * mean)


@given(st.floats(1, 5000), st.floats(0.1, 4), st.integers(0, 99))
def test_log_normal_lengths_keep_their_bounds(mean: float, sigma: float, seed: int) -> None:
    assert SHORTEST <= Lengths(f"lognormal:{mean}:{sigma}", "new").draw(random.Random(seed)) <= LONGEST


def test_means_are_as_asked() -> None:
    r = random.Random(0)
    for text, mean, slack in (
        ("256:77", 256, 4),
        ("lognormal:100:0.5", 100, 3),
        ("37", 37, 0),
        ("sharegpt", 155, 12),
    ):
        lengths = Lengths(text, "prompt")
        assert statistics.mean(lengths.draw(r) for _ in range(5000)) == pytest.approx(mean, abs=slack)


@pytest.mark.parametrize("text", ["", "none", "0", "-3", "5:-1", "nan", "inf", "lognormal", "lognormal:0", "5:x"])
def test_a_length_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--new"):
        Lengths(text, "new")


@given(st.integers(0, 2**31), st.integers(300, 60000))
def test_prompts_repeat_with_their_seed_and_share_no_beginning(seed: int, vocab: int) -> None:
    load = replace(LOAD, prompt="32:10", vocab=vocab)
    asks = Workload(load).draw(seed, 20)
    assert asks == Workload(load).draw(seed, 20)
    assert asks != Workload(load).draw(seed + 1, 20)
    assert all(100 <= token < vocab - 100 for ask in asks for token in ask.prompt)
    assert all(len(ask.prompt) == ask.prompt_tokens for ask in asks)
    assert len({tuple(ask.prompt[:16]) for ask in asks if ask.prompt_tokens > 3}) == len(
        [ask for ask in asks if ask.prompt_tokens > 3]
    )


def test_pieces_of_a_text_are_given_out_once_over_all_runs(tmp_path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(chr(0x4E00 + k) for k in range(4 * 10 * 6)), encoding="utf-8")
    work = Workload(replace(LOAD, prompt="10", text=path))
    pieces = [ask.prompt for seed in (1, 2) for ask in work.draw(seed, 3)]
    assert len(set("".join(pieces))) == sum(map(len, pieces)) == 240
    with pytest.raises(ValueError, match="too little text"):
        work.draw(3, 1)


@pytest.mark.parametrize("burst", [1.0, 4.0, 0.25])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(burst: float) -> None:
    times = arrivals(5.0, 20000, 3, burst)
    between = [b - a for a, b in pairwise(times)]
    assert times[0] == 0
    assert all(gap >= 0 for gap in between)
    mean = statistics.mean(between)
    assert mean == pytest.approx(0.2, rel=0.05)
    assert statistics.variance(between) / mean**2 == pytest.approx(burst, rel=0.1)
    assert times[:9] == arrivals(5.0, 9, 3, burst) != arrivals(5.0, 9, 4, burst)


def test_bodies_ask_for_exact_lengths(tmp_path) -> None:
    ask = Workload(replace(LOAD, prompt="5", new="7")).draw(0, 1)[0]
    body = json.loads(bodies(replace(LOAD, extra='{"temperature": 1}'), "m", [ask], True)[0])
    assert body["prompt"] == ask.prompt
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (7, True, 1)
    assert body["stream_options"] == {"include_usage": True}
    body = json.loads(bodies(replace(LOAD, ignore_eos=False), "m", [ask], False)[0])
    assert not {"ignore_eos", "return_token_ids"} & set(body)
    book = tmp_path / "a.txt"
    book.write_text("word " * 99)
    chat = replace(LOAD, text=book, chat=True, prompt="5")
    body = json.loads(bodies(chat, "m", Workload(chat).draw(0, 1), False)[0])
    assert body["messages"] == [{"role": "user", "content": "word word word word "}]


def test_runs_are_named() -> None:
    load = replace(LOAD, concurrency=(2,), rate=(0.5,))
    assert list(runs(load)) == [("closed c=2", 2, 0.0), ("poisson r=0.5", 0, 0.5)]
    assert [name for name, _, _ in runs(replace(load, burst=4.0))] == ["closed c=2", "gamma 4 r=0.5"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"url": "localhost:8000"}, "--url"),
        ({"url": "ftp://x"}, "--url"),
        ({"num": 0}, "--num"),
        ({"warmup": -1}, "--warmup"),
        ({"timeout": 0.0}, "--timeout"),
        ({"burst": float("nan")}, "--burst"),
        ({"vocab": 200}, "--vocab"),
        ({"concurrency": (0,)}, "--concurrency"),
        ({"rate": (0.0,)}, "--rate"),
        ({"extra": "[1]"}, "--extra"),
        ({"extra": "{"}, "--extra"),
        ({"chat": True}, "--text"),
        ({"prompt": "x"}, "--prompt"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(LOAD, **change).check()
