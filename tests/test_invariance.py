"""The tokens of a request depend on nothing but it: not on batch mates, chunks, policies, preemption, prefix hits,
guesses or the size of blocks. Each is forced here, in fp32 and, with the native kernels, in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

import pytest
import torch
from engines import Client, alone, ask, drain, engine, prompt

from coterie.infer.drafts import Asked, Guess
from coterie.infer.request import Key
from coterie.infer.step import Policy, Step
from coterie.kernels import native

NATIVE = pytest.mark.skipif(native.library() is None, reason="needs the native kernels: torch's own sums differ")
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16", marks=NATIVE),
]
TOKENS = 14
LENGTHS = (1, 4, 5, 30, 61, 90)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.3, "seed": 2, "top_k": 20, "presence_penalty": 0.5},
    {"temperature": 0.8, "seed": 3, "top_p": 0.8, "min_p": 0.01},
    {"repetition_penalty": 1.3, "min_tokens": 3},
    {"temperature": 1.0, "seed": 4, "logprobs": 2},
)


@cache
def _expected(dtype: torch.dtype) -> list[list[int]]:
    """Of every request when nothing else is there, in blocks and chunks that hold it whole."""
    of = {"dtype": dtype, "block_size": 128, "budget": 1024, "prefix_cache": False}
    return [alone(prompt(n, n), TOKENS, of=of, **how) for n, how in zip(LENGTHS, SETTINGS, strict=True)]


def _asked(served) -> list[Client]:
    return [ask(served, prompt(n, n), TOKENS, **how) for n, how in zip(LENGTHS, SETTINGS, strict=True)]


def _check(clients: list[Client], dtype: torch.dtype) -> None:
    assert [client.tokens() for client in clients] == _expected(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_requests_would_show_a_difference(dtype: torch.dtype) -> None:
    found = _expected(dtype)
    assert len(set(map(tuple, found))) == len(found)
    assert all(len(set(tokens)) > 3 for tokens in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", get_args(Policy))
def test_policies(policy: Policy, dtype: torch.dtype) -> None:
    served = engine(policy=policy, dtype=dtype, max_step_tokens=100)
    clients = _asked(served)
    drain(served)
    _check(clients, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("budget", "block_size"), [(7, 1), (9, 3), (16, 16), (33, 7), (200, 5)])
def test_chunks_and_blocks(budget: int, block_size: int, dtype: torch.dtype) -> None:
    served = engine(budget=budget, block_size=block_size, dtype=dtype, max_model_len=120)
    clients = _asked(served)
    drain(served)
    _check(clients, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_mates_that_come_later(dtype: torch.dtype) -> None:
    served = engine(budget=20, dtype=dtype)
    clients = []
    for n, how in zip(LENGTHS, SETTINGS, strict=True):
        clients.append(ask(served, prompt(n, n), TOKENS, **how))
        for _ in range(3):
            served.step()
    drain(served)
    _check(clients, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [True, False], ids=["prefix cache", "no prefix cache"])
def test_a_pool_too_small_for_all(cached: bool, dtype: torch.dtype) -> None:
    served = engine(blocks=27, budget=40, dtype=dtype, prefix_cache=cached)
    several = [_asked(served) for _ in range(4)]
    drain(served)
    for clients in several:
        _check(clients, dtype)
    assert served.core.scheduler.roster.preemptions > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("overlaps", [True, False])
def test_recorded_steps_and_clients_told_meanwhile(overlaps: bool, recorded: bool, dtype: torch.dtype) -> None:
    served = engine(budget=40, dtype=dtype)
    served.core.overlaps = overlaps
    served.core.runner.decodes.why_not = None if recorded else "switched off"
    clients = _asked(served)
    drain(served)
    _check(clients, dtype)
    assert bool(served.core.runner.decodes._recordings) == recorded


@pytest.mark.parametrize("dtype", DTYPES)
def test_preemption_at_every_step(dtype: torch.dtype) -> None:
    """Every other one, and of everything time after time."""
    for victim in (*range(0, 30, 2), None):
        served = engine(budget=40, dtype=dtype, prefix_cache=victim is None or victim % 4 == 0)
        clients, steps = _asked(served), 0
        while not served.idle:
            served.step()
            roster = served.core.scheduler.roster
            if steps == victim or (victim is None and steps % 2):
                for request in list(roster.running.values()):
                    roster.preempt(request)
            steps += 1
            assert steps < 500
        drain(served)
        _check(clients, dtype)
    assert served.core.scheduler.roster.preemptions > 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefix_hits(dtype: torch.dtype) -> None:
    served = engine(dtype=dtype, block_size=4)
    for _ in range(2):
        clients = _asked(served)
        drain(served)
        _check(clients, dtype)
    assert [client.last().cached for client in clients] == [0, 3, 4, 28, 60, 88]
    # A prefix of another's prompt and answer.
    whole = [*prompt(90, 90), *clients[-1].tokens()]
    for cut in (20, 61, 97):
        again = ask(served, whole[:cut], TOKENS)
        drain(served)
        assert again.last().cached >= cut - 4
        of = {"dtype": dtype, "prefix_cache": False}
        assert again.tokens() == alone(whole[:cut], TOKENS, of=of)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "fp8"])
def test_keys_and_values_of_fewer_bits(kv_dtype: str) -> None:
    """They change the tokens, but in the same way wherever and whenever they are written."""
    of = {"kv_dtype": kv_dtype, "block_size": 128, "budget": 1024, "prefix_cache": False}
    expected = [alone(prompt(n, n), TOKENS, of=of, **how) for n, how in zip(LENGTHS, SETTINGS, strict=True)]
    served = engine(budget=20, block_size=4, kv_dtype=kv_dtype)
    for _ in range(2):
        clients = _asked(served)
        for _ in range(9):
            served.step()
        roster = served.core.scheduler.roster
        for request in list(roster.running.values()):
            roster.preempt(request)
        drain(served)
        assert [client.tokens() for client in clients] == expected


class Oracle:
    """Guesses what it is told will come; every `wrong`-th guess is not that."""

    def __init__(self, answers: dict[Key, list[int]], prompts: dict[Key, int], wrong: int) -> None:
        self.answers, self.prompts, self.wrong = answers, prompts, wrong
        self.followed = self.forgot = 0

    def follow(self, step: Step) -> None:
        self.followed += 1

    def propose(self, asked: Sequence[Asked]) -> list[Guess]:
        found = []
        for one in asked:
            assert one.row.position == len(one.tokens) - self.prompts[one.key]
            rest = self.answers[one.key][one.row.position :][: one.count]
            found.append(
                Guess(tuple((t + (i % self.wrong == self.wrong - 1)) % 300 for i, t in enumerate(rest)), None)
            )
        return found

    def forget(self, key: Key) -> None:
        self.forgot += 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [99, 2, 3])
def test_guesses(wrong: int, dtype: torch.dtype) -> None:
    for blocks in (0, 32):
        served, reports = engine(blocks=blocks, budget=40, dtype=dtype), []
        served.watch(reports.append)
        clients = _asked(served)
        keys = [(client.id, 0) for client in clients]
        answers = dict(zip(keys, _expected(dtype), strict=True))
        oracle = Oracle(answers, dict(zip(keys, LENGTHS, strict=True)), wrong)
        served.core.drafter = oracle
        drain(served)
        _check(clients, dtype)
        assert served.core.drafter is oracle, "it has failed"
        assert oracle.forgot == len(keys)
        drafted, accepted = (sum(getattr(r, name) for r in reports) for name in ("drafted", "accepted"))
        assert 0 < accepted <= drafted
        assert (accepted == drafted) == (wrong == 99)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guesses_from_repeats_of_the_text(dtype: torch.dtype) -> None:
    served = engine(budget=40, dtype=dtype, draft="ngram")
    for _ in range(2):
        clients = _asked(served)
        drain(served)
        _check(clients, dtype)


def test_guesses_by_chance_keep_the_distribution() -> None:
    """A drafter that tells its probabilities is checked by Leviathan's rule: the tokens are others, their frequencies
    are not."""
    size, draws = 300, 600
    ids, settings = prompt(5), {"temperature": 0.7, "top_k": 4}

    def counts(drafter: Any) -> torch.Tensor:
        served = engine(max_sequences=100)
        served.core.drafter = drafter
        clients = [ask(served, ids, 2, n=100, seed=i, **settings) for i in range(draws // 100)]
        drain(served)
        last = [client.tokens(i)[1] for client in clients for i in range(100)]
        return torch.bincount(torch.tensor(last), minlength=size) / draws

    class Chance:
        def follow(self, step: Step) -> None: ...
        def forget(self, key: Key) -> None: ...

        def propose(self, asked: Sequence[Asked]) -> list[Guess]:
            probs_NV = torch.full((1, size), 1.0 / size, dtype=torch.float64)
            generator = torch.Generator().manual_seed(9)
            return [Guess((int(torch.randint(size, (), generator=generator)),), probs_NV) for _ in asked]

    assert (counts(None) - counts(Chance())).abs().max() < 0.07


def test_a_drafter_that_fails_is_left_alone() -> None:
    class Broken(Oracle):
        def propose(self, asked: Sequence[Asked]) -> list[Guess]:
            raise RuntimeError

    served = engine(budget=40)
    clients = _asked(served)
    served.core.drafter = Broken({}, {}, 1)
    drain(served)
    _check(clients, torch.float32)
    assert served.core.drafter is None
