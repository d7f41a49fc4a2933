"""Every setting of a request has a bound, and one sentence says it."""

import math
from typing import Any

import pytest

from coterie.infer.request import Request, RequestError, SamplingParams

NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = ("top_k", "n", "best_of", "seed", "logprobs", "min_tokens", "max_tokens")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -3.0, True, "1", None, [1.0]])
def test_no_number_of_another_kind(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} is .*: give a finite number from [^.\n]*"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, 1.0, math.nan, "1", -(2**70), 2**70, [1]])
def test_no_integer_of_another_kind(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} is .*: give a whole number from"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"n": 0}, "n is 0"),
        ({"n": 129}, "n is 129"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"min_tokens": 17}, "min_tokens 17 is over max_tokens 16"),
        ({"n": 3, "best_of": 2}, "best_of 2 is under n 3"),
        ({"ignore_eos": 1}, "ignore_eos is 1: give true or false"),
        ({"stop": "end"}, "stop is 'end': give a list"),
        ({"stop": ("",)}, "stop holds ''"),
        ({"stop": ("x" * 257,)}, r"stop holds 'x+\.\.\.: give strings of 1 to 256 characters"),
        ({"stop": ("x",) * 17}, "stop has 17 entries, but at most 16 are taken"),
        ({"stop": (b"x",)}, "stop holds b'x'"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids is -1"),
        ({"stop_token_ids": (True,)}, "stop_token_ids is True"),
        ({"stop_token_ids": tuple(range(65))}, "stop_token_ids has 65 entries"),
        ({"logit_bias": {1: 2.0}}, "logit_bias is {1: 2.0}: give a list"),
        ({"logit_bias": (1,)}, "logit_bias holds 1: give"),
        ({"logit_bias": ((1, math.nan),)}, "logit_bias is nan"),
        ({"logit_bias": ((1, 101),)}, "logit_bias is 101"),
        ({"logit_bias": ((1.5, 1),)}, "logit_bias is 1.5"),
        ({"logit_bias": ((1, 1), (1, 2))}, "logit_bias names a token twice"),
        ({"logit_bias": tuple((i, 1) for i in range(1025))}, "logit_bias has 1025 entries"),
    ],
)
def test_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        SamplingParams(**settings)


def test_what_is_taken() -> None:
    stops = ["a", "b"]
    params = SamplingParams(temperature=1, stop=stops, logit_bias=[[3, 1]], n=2, best_of=4, seed=-1)  # pyright: ignore
    stops.append("c")
    assert params.stop == ("a", "b"), "what the caller does later changes nothing"
    assert params.logit_bias == ((3, 1.0),)
    assert isinstance(params.temperature, float)
    assert (params.sequences, SamplingParams(n=3).sequences) == (4, 3)


def test_ids_outside_the_vocabulary() -> None:
    SamplingParams(stop_token_ids=(9,), logit_bias=((9, 1.0),)).check_vocabulary(10)
    for params in (SamplingParams(stop_token_ids=(10,)), SamplingParams(logit_bias=((10, 1.0),))):
        with pytest.raises(RequestError, match="names token 10, but the vocabulary has 10 tokens"):
            params.check_vocabulary(10)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "the prompt is empty"),
        ((1, -1), "the prompt's token is -1"),
        ((True,), "the prompt's token is True"),
        ((2**40,), "the prompt's token is"),
        (("a",), "the prompt's token is 'a'"),
    ],
)
def test_prompts(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request("a", prompt)


def test_identity_and_times() -> None:
    with pytest.raises(RequestError, match="id is ''"):
        Request("", (1,))
    with pytest.raises(RequestError, match="deadline is nan"):
        Request("a", (1,), deadline=math.nan)
