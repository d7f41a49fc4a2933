"""Guessing ahead: what is guessed, and that answers stay as they were."""

import time
from functools import cache

import pytest
import torch
from engines import CONFIG, ask, drain, engine, model, prompt, recomputed, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.infer.config import EngineConfig
from coterie.infer.draft_model import DraftModel, make_drafter
from coterie.infer.drafts import Asked, NgramDrafter, Pace
from coterie.infer.engine import Engine
from coterie.infer.outputs import StepReport
from coterie.infer.request import SamplingParams
from coterie.infer.sampling import Row
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.tokenizer import train_bpe
from coterie.models.weights import save_model

ROW = Row(SamplingParams(temperature=0.0))


def guess(drafter: NgramDrafter, tokens, count: int = 4, key=("a", 0)) -> tuple[int, ...]:
    (found,) = drafter.propose([Asked(key, list(tokens), (), count, ROW)])
    assert found.probs_NV is None
    return found.tokens


def test_what_followed_before_is_guessed_again() -> None:
    assert guess(NgramDrafter(), [5, 6, 7, 8, 9, 1, 5, 6]) == (7, 8, 9, 1)
    assert guess(NgramDrafter(), [5, 6, 7, 8, 9, 1, 5]) == ()  # one token is no run
    assert guess(NgramDrafter(), [1, 2, 3]) == ()
    assert guess(NgramDrafter(), [1, 2, 9, 7, 1, 2, 9, 8, 1, 2]) == (9, 8, 1, 2)  # the last time counts
    assert guess(NgramDrafter(), [4, 1, 2, 7, 5, 1, 2, 8, 4, 1, 2]) == (7, 5, 1, 2)  # the longest run counts more
    assert guess(NgramDrafter(), [1, 2, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)  # past the end it goes on


def test_guesses_are_fewer_while_they_are_wrong() -> None:
    pace = Pace()
    assert pace.count([1], 8) == 8
    pace.made([1], (2, 3, 4, 5, 6, 7, 8, 9))
    assert pace.count([1, 2, 3, 99], 8) == 3
    pace.made([1, 2, 3, 99], (4, 5, 6))
    assert pace.count([1, 2, 3, 99, 4, 5, 6, 7], 8) == 6
    pace.made([0], (1,))
    assert pace.count([0, 2], 8) == 1
    assert pace.count([0, 2, 3], 8) == 1  # nothing was guessed meanwhile


def slow(tokens: list[int], count: int, window: int) -> set[tuple[int, ...]]:
    """What may be guessed: found by looking everywhere."""
    for size in (4, 3, 2):
        ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[-size:]]
        if size < len(tokens) and ends:
            end = ends[-1]
            if end <= len(tokens) - 1 - window:
                return {(), tuple((tokens[end:] * count)[:count])}
            return {tuple((tokens[end:] * count)[:count])}
    return {()}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(1, 5), max_size=20))
def test_the_index_grows_with_the_text(tokens: list[int], strides: list[int]) -> None:
    drafter, end = NgramDrafter(), 1
    for stride in [0, *strides]:
        end = min(len(tokens), end + stride)
        drafter._indices.get(("a", 0), drafter).pace = Pace()  # the count is another test's
        assert guess(drafter, tokens[:end], 3) in slow(tokens[:end], 3, 1000)


def test_the_index_is_bounded_in_time_and_size() -> None:
    drafter, tokens = NgramDrafter(window=1000), prompt(300) * 700
    start = time.perf_counter()
    guess(drafter, tokens)
    for end in range(5):
        guess(drafter, [*tokens, *range(end)])
    assert time.perf_counter() - start < 0.5
    for _ in range(40):
        tokens += prompt(97, len(tokens))
        guess(drafter, tokens)
        assert len(drafter._indices["a", 0]._ends) <= 3 * 3 * 1000
    drafter.forget(("a", 0))
    drafter.forget(("b", 0))
    assert not drafter._indices


@cache
def student(kind: str) -> GPT:
    """The model itself; its first layers, as a Mixture-of-Students is made; or another one."""
    if kind == "itself":
        return model()
    depth = 2 if kind == "shallow" else 1
    config = ModelConfig(**(vars(CONFIG) | {"layers": depth, "experts": CONFIG.experts[:depth]}))
    with torch.inference_mode(False):
        made = GPT(config)
        made.init_weights(8 if kind == "shallow" else 3)
    if kind == "shallow":
        made.load_state_dict(
            {name: value for name, value in model().state_dict().items() if name in made.state_dict()}
        )
    return made.eval()


def drafting(kind: str, **settings) -> tuple[Engine, list[StepReport]]:
    settings = {"block_size": 4, "budget": 64, "max_model_len": CONFIG.max_positions, "draft_tokens": 3} | settings
    draft = None if kind == "ngram" else student(kind)
    made = Engine(model(), None, EngineConfig(draft=kind if kind == "ngram" else "", **settings), draft_model=draft)
    reports: list[StepReport] = []
    made.watch(reports.append)
    return made, reports


KINDS = ["ngram", "itself", "shallow", "other"]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_without_guesses(kind: str) -> None:
    served, reports = drafting(kind)
    prompts = [prompt(n, n) for n in (1, 3, 4, 17, 60)] + [prompt(5) * 6]
    clients = [ask(served, ids, 30) for ids in prompts]
    drain(served)
    for ids, client in zip(prompts, clients, strict=True):
        assert client.tokens() == recomputed(ids, 30)
    drafted, accepted = sum(r.drafted for r in reports), sum(r.accepted for r in reports)
    assert drafted > 0
    if kind == "itself":
        assert accepted == drafted
        assert sum(r.generated for r in reports) > 2.5 * sum(r.decodes for r in reports)
    else:
        assert 0 < accepted < drafted or kind == "other"
    assert served.core.drafter is not None, "it failed"


@pytest.mark.parametrize("kind", ["itself", "shallow", "ngram"])
def test_preemption_forks_and_shared_prefixes_do_not_matter(kind: str) -> None:
    size, each = 4, 4 * CONFIG.layers * 2 * CONFIG.num_kv_heads * CONFIG.width_per_head * 4
    more = 0 if kind == "ngram" else each * student(kind).config.layers // CONFIG.layers
    served, reports = drafting(kind, kv_memory=26 * (each + more), max_model_len=100)
    assert served.core.pool.count == 26
    shared = prompt(19, 1)
    first = ask(served, shared, 6)
    drain(served)
    assert first.tokens() == recomputed(shared, 6)
    prompts = [[*shared, *prompt(n, n)] for n in (1, 5, 9)]
    clients = [ask(served, ids, 25, n=2) for ids in prompts]
    drain(served)
    assert served.core.scheduler.roster.preemptions > 0
    assert served.core.pool.hit > 0
    assert served.core.pool.size == size
    for ids, client in zip(prompts, clients, strict=True):
        assert client.tokens(0) == client.tokens(1) == recomputed(ids, 25)
    if kind == "itself":  # its keys and values are the model's own: a guess is wrong where they were mistaken
        assert sum(r.accepted for r in reports) == sum(r.drafted for r in reports) > 0


TINY = ModelConfig(
    vocab_size=5, max_positions=64, layers=1, dim=16, heads=2, hidden=16, init_std=0.6, tied_head=False
)  # fmt: skip


@cache
def tiny(seed: int) -> GPT:
    with torch.inference_mode(False):
        made = GPT(TINY)
        made.init_weights(seed)
        return made.eval()


def counted(draft: GPT | None, kind: str, requests: int, **asked) -> torch.Tensor:
    """How often each text of three tokens comes, (125,)."""
    served = Engine(
        tiny(1),
        None,
        EngineConfig(draft=kind, budget=600, draft_tokens=3, max_sequences=512, block_size=4),
        draft_model=draft,
    )
    first = 0 if draft is None and not kind else 1_000_000
    clients = [
        ask(served, [1, 2, 3, 1, 2], 4, **{"temperature": 1.0, "seed": first + i} | asked) for i in range(requests)
    ]
    drain(served)
    ids = torch.tensor([client.tokens()[:3] for client in clients])
    return (ids * torch.tensor([25, 5, 1])).sum(1).bincount(minlength=125).double()


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.7, "top_k": 3}, {"repetition_penalty": 1.6}], ids=str)
@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_sampled_texts_come_as_often_as_without_guesses(kind: str, asked: dict) -> None:
    count = 700
    plain_C = counted(None, "", count, **asked)
    guessed_C = counted(tiny(2) if kind == "model" else None, "ngram" if kind == "ngram" else "", count, **asked)
    both_C = plain_C + guessed_C
    common = both_C >= 10
    plain_C, guessed_C = (torch.cat([x[common], x[~common].sum()[None]]) for x in (plain_C, guessed_C))
    seen = plain_C + guessed_C > 0
    statistic = ((plain_C - guessed_C)[seen] ** 2 / (plain_C + guessed_C)[seen]).sum()
    free = int(seen.sum()) - 1
    assert free >= 3
    assert statistic < free + 4 * (2 * free) ** 0.5 + 4, f"{statistic} with {free} degrees of freedom"


def test_ngram_guesses_leave_a_seeds_text_as_it_is() -> None:
    texts = []
    for kind in ("", "ngram"):
        served = Engine(tiny(1), None, EngineConfig(draft=kind, budget=64, block_size=4))
        clients = [ask(served, [1, 2, 3, 1, 2], 40, temperature=1.0, seed=i) for i in range(10)]
        drain(served)
        texts.append([client.tokens() for client in clients])
    assert texts[0] == texts[1]


def test_a_draft_model_that_is_broken_only_costs_time() -> None:
    broken = GPT(CONFIG).eval()
    broken.init_weights(1)
    with torch.no_grad():
        broken.embed.weight.fill_(float("nan"))
    served = Engine(model(), None, EngineConfig(budget=64, block_size=4), draft_model=broken)
    for asked in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        client = ask(served, prompt(9), 12, **asked)
        drain(served)
        plain = engine()
        expected = ask(plain, prompt(9), 12, **asked)
        drain(plain)
        assert client.tokens() == expected.tokens()


def test_a_draft_model_must_fit() -> None:
    kind = {"vocabulary": 300, "blocks": 8, "block_size": 4, "max_model_len": 160, "draft_tokens": 3}
    with pytest.raises(ValueError, match="5 tokens and the model 300: give one with the same tokenizer"):
        DraftModel(tiny(1), **kind)
    with pytest.raises(ValueError, match="160 positions, but texts may have 161"):
        DraftModel(model(), **kind | {"max_model_len": 161})
    with pytest.raises(ValueError, match="was not opened"):
        make_drafter(EngineConfig(draft="somewhere"), None, vocabulary=5, blocks=1, max_model_len=9)


def test_more_sequences_than_scratch_blocks_are_guessed_for_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.infer.draft_model._TOGETHER", 3)
    served, reports = drafting("itself")
    prompts = [prompt(4 + n, n) for n in range(8)]
    clients = [ask(served, ids, 9) for ids in prompts]
    drain(served)
    assert [client.tokens() for client in clients] == [recomputed(ids, 9) for ids in prompts]
    assert sum(r.accepted for r in reports) == sum(r.drafted for r in reports) > 0


def test_an_engine_opens_the_draft_model_that_it_is_told_of(tmp_path) -> None:
    for name, one in (("model", model()), ("student", student("shallow"))):
        save_model(tmp_path / name, one)
        tokenizer().save(tmp_path / name / "tokenizer.json")
    settings = {"block_size": 4, "budget": 64, "device": "cpu"}
    served = Engine.open(tmp_path / "model", EngineConfig(draft=str(tmp_path / "student"), **settings))
    reports: list[StepReport] = []
    served.watch(reports.append)
    client = ask(served, prompt(9), 12)
    drain(served)
    assert client.tokens() == recomputed(prompt(9))
    assert sum(r.drafted for r in reports) > 0
    with pytest.raises(FileNotFoundError):
        Engine.open(tmp_path / "model", EngineConfig(draft=str(tmp_path / "nobody"), **settings))
    train_bpe(["other words, of which no pair is alike"] * 3, 290).save(tmp_path / "student" / "tokenizer.json")
    with pytest.raises(ValueError, match=r"^the draft model has another tokenizer: '.*' is .* to it, and") as caught:
        Engine.open(tmp_path / "model", EngineConfig(draft=str(tmp_path / "student"), **settings))
    assert "\n" not in str(caught.value)
    (tmp_path / "student" / "tokenizer.json").unlink()  # then the size alone must do
    Engine.open(tmp_path / "model", EngineConfig(draft=str(tmp_path / "student"), **settings))
