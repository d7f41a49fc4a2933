"""Log probabilities of prompts: those of a pass over the whole text, however it was computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import ask, drain, engine, model, prompt, tokenizer
from serving import client_of, complete

from coterie.infer.outputs import TokenLogprob
from coterie.infer.pipeline import Pipeline
from coterie.infer.prompt_logprobs import prompt_rows, read_prompt_rows
from coterie.infer.request import SamplingParams
from coterie.infer.sample_state import PromptLogprobs, SampleState
from coterie.infer.scheduler import PROMPT_ROWS
from coterie.infer.step import Slice


@torch.inference_mode()
def _forced(ids: list[int], most: int) -> list[TokenLogprob]:
    """What a pass over the whole prompt says."""
    logits_BSV = model()(torch.tensor([ids])).logits_BSV
    assert logits_BSV is not None
    logprobs_SV = logits_BSV[0].double().log_softmax(-1)
    top = logprobs_SV.topk(max(most, 1))
    return [
        TokenLogprob(
            token,
            float(logprobs_SV[i, token]),
            tuple(zip(top.indices[i].tolist()[:most], top.values[i].tolist()[:most], strict=True)),
        )
        for i, token in enumerate(ids[1:])
    ]


def _same(found: tuple[TokenLogprob, ...], expected: list[TokenLogprob]) -> None:
    assert [one.token for one in found] == [one.token for one in expected]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=2e-5)
    for mine, theirs in zip(found, expected, strict=True):
        assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
        assert [x for _, x in mine.top] == pytest.approx([x for _, x in theirs.top], abs=2e-5)


@pytest.mark.parametrize("settings", [{}, {"budget": 7}, {"policy": "prefill_first"}, {"draft": "ngram"}])
def test_they_are_those_of_one_pass(settings: dict) -> None:
    served = engine(**settings)
    lengths = [1, 2, 40, 5, 121]
    plain = ask(served, prompt(30, 9))
    clients = [ask(served, prompt(n, n), 6, prompt_logprobs=n % 4) for n in lengths]
    drain(served)
    for length, client in zip(lengths, clients, strict=True):
        _same(client.deltas[0][0].prompt_logprobs, _forced(prompt(length, length), length % 4))
        assert not any(delta.prompt_logprobs for delta in client.deltas[0][1:])
    assert not any(delta.prompt_logprobs for delta in plain.deltas[0])


def test_what_is_cached_does_not_hide_them() -> None:
    served = engine()
    ids = prompt(50)
    cases = [({}, 0), ({"prompt_logprobs": 2}, 0), ({"prompt_logprobs": 0}, 0), ({}, 48)]
    for asked, cached in cases:
        client = ask(served, ids, 4, **asked)
        drain(served)
        assert client.last().cached == cached
        if asked:
            _same(client.deltas[0][0].prompt_logprobs, _forced(ids, asked["prompt_logprobs"]))


def test_preemption_and_samples_tell_them_once() -> None:
    served = engine(blocks=30, budget=16)
    clients = [ask(served, prompt(20, seed), 40, prompt_logprobs=1, n=1 + seed % 2) for seed in range(6)]
    drain(served)
    assert served.core.scheduler.roster.preemptions > 0
    for seed, client in enumerate(clients):
        for index in range(1 + seed % 2):
            _same(client.deltas[index][0].prompt_logprobs, _forced(prompt(20, seed), 1))


def test_a_prompt_that_is_preempted_on_its_way_goes_on_telling() -> None:
    served = engine(budget=16)
    client = ask(served, prompt(60), 4, prompt_logprobs=1)
    for _ in range(2):
        served.step()
    (live,) = served.core.live.values()
    assert live.state.prompt is not None
    assert 0 < len(live.state.prompt.told) < 59
    with served.core.lock:
        served.core.scheduler.roster.preempt(live.request)
    drain(served)
    _same(client.deltas[0][0].prompt_logprobs, _forced(prompt(60), 1))


def test_a_step_has_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine(budget=2048)
    rows: list[int] = []

    def counted(*what: Any) -> Any:
        found = prompt_rows(*what)
        rows.append(sum(len(one.at) for one in found))
        return found

    monkeypatch.setattr("coterie.infer.runner.prompt_rows", counted)
    clients = [ask(served, prompt(150, seed), 2, prompt_logprobs=0) for seed in range(5)]
    drain(served)
    assert max(rows) <= PROMPT_ROWS < sum(rows) == 5 * 149
    assert all(len(client.deltas[0][0].prompt_logprobs) == 149 for client in clients)


def test_the_pipeline_tells_them_and_the_best_of_several_too() -> None:
    pipe = Pipeline(engine(text=True))
    ids = tokenizer().encode("the cat sat on a hat")
    for settings in ({}, {"n": 2, "best_of": 3}):
        for found in pipe(ids, max_new_tokens=3, prompt_logprobs=1, **settings):
            _same(found.prompt_logprobs, _forced(ids, 1))


def test_what_is_known_is_not_told_again() -> None:
    told = PromptLogprobs((5, 6, 7, 8), 0)
    states = {("a", i): SampleState(SamplingParams(), prompt=told) for i in range(2)}
    slices = [Slice(("a", i), 0, (5, 6, 7), (), False) for i in range(2)]
    wanted = prompt_rows(slices, states)
    assert [list(one.at) for one in wanted] == [[0, 1, 2], [3, 4, 5]]  # two samples, when the first has failed
    read_prompt_rows(torch.randn(6, 9), wanted)
    assert [one.token for one in told.told] == [6, 7, 8]
    del told.told[1:]
    assert [list(one.at) for one in prompt_rows(slices[:1], states)] == [[1, 2]]
    assert prompt_rows([Slice(("a", 0), 2, (7, 8), (), True)], states) == []  # what lies between comes first


def test_the_api_tells_them_as_lm_evaluation_harness_reads_them() -> None:
    served: Any = engine(text=True)
    texts = [prompt(12, seed) for seed in range(3)]
    asked = {"prompt": texts, "echo": True, "logprobs": 1, "temperature": 0}
    with client_of(served, model_name="fake") as client:
        for most in (0, 1):
            choices = complete(client, **asked, max_tokens=most).json()["choices"]
            for ids, choice in zip(texts, choices, strict=True):
                told, expected = choice["logprobs"], _forced(ids, 1)
                assert told["token_logprobs"][0] is None
                assert len(told["token_logprobs"]) == 12 + most
                found = told["token_logprobs"][1:12]
                assert found == pytest.approx([one.logprob for one in expected], abs=2e-5)
                best = [one.logprob == pytest.approx(one.top[0][1], abs=1e-6) for one in expected]
                pairs = zip(told["tokens"][1:12], told["top_logprobs"][1:12], strict=True)
                assert [token == max(top, key=top.get) for token, top in pairs] == best
