"""Sampling of a batch: each row as if it were alone, and as the plain reference says."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.infer.counter import ACCEPT, DRAFT, SAMPLE, seed_of_choice, splitmix, uniform
from coterie.infer.penalties import History
from coterie.infer.request import SamplingParams as Asked
from coterie.infer.sampling import Row, SamplingBatch, distribution, reference, sample_batch
from coterie.infer.truncate import largest

ASKED = st.builds(
    Asked,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.0, 2.5]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 127, 128, 500, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.25, -0.5]),
    logit_bias=st.sampled_from([(), (), ((3, 4.0), (0, -100.0))]),
    logprobs=st.sampled_from([None, 0, 1, 5]),
)


@st.composite
def rows(draw: st.DrawFn, size: int) -> Row:
    tokens = st.lists(st.integers(0, size - 1), max_size=12)
    mask = None
    kind = draw(st.sampled_from(["none", "none", "bool", "bits"]))
    if kind == "bool":
        mask = torch.rand(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.5
        mask[size // 2] = True
    elif kind == "bits":
        mask = torch.full((-(-size // 32),), 0x7FFF0FF0, dtype=torch.int32)
    return Row(
        draw(ASKED),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        position=draw(st.integers(0, 10**6)),
        history=History(draw(tokens), draw(tokens)),
        drafts=draw(tokens),
        banned=draw(st.sampled_from([(), (1, 2)])),
        mask=mask,
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[torch.Tensor, list[Row]]:
    size = draw(st.sampled_from([33, 257, 1031, 5003]))
    told = draw(st.lists(rows(size), min_size=1, max_size=7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits_BV = torch.randn(len(told), size, generator=generator) * draw(st.sampled_from([0.0, 0.1, 3.0, 15.0]))
    # Half of the models compute in bf16, whose logits are often equal.
    return (logits_BV.bfloat16() if draw(st.booleans()) else logits_BV), told


@settings(max_examples=100, deadline=None)
@given(steps(), st.randoms(use_true_random=False))
def test_a_row_is_the_same_in_any_batch(step: tuple[torch.Tensor, list[Row]], shuffle) -> None:
    logits_BV, told = step
    order = [shuffle.randrange(len(told)) for _ in range(len(told) + 2)]
    whole = sample_batch(logits_BV[order], SamplingBatch([told[i] for i in order]))
    for place, index in enumerate(order):
        alone = sample_batch(logits_BV[index : index + 1], SamplingBatch([told[index]]))
        assert whole.ok_B[place] == alone.ok_B[0]
        assert whole.ids_B[place] == alone.ids_B[0]
        for name in ("logprobs_B", "drawn_logprobs_B"):
            assert torch.equal(
                getattr(whole, name)[place].view(torch.int32), getattr(alone, name)[0].view(torch.int32)
            )
        asked = told[index].settings.logprobs or 0
        assert torch.equal(whole.top_ids_BN[place, :asked], alone.top_ids_BN[0, :asked])
        assert torch.equal(whole.top_logprobs_BN[place, :asked], alone.top_logprobs_BN[0, :asked])


@settings(max_examples=100, deadline=None)
@given(steps())
def test_the_distribution_is_the_references(step: tuple[torch.Tensor, list[Row]]) -> None:
    logits_BV, told = step
    batch = SamplingBatch(told)
    probs_BV, drawn = distribution(logits_BV, batch), sample_batch(logits_BV, batch)
    for index, row in enumerate(told):
        assert torch.equal(probs_BV[index], reference(logits_BV[index], row)), row
        chance = probs_BV[index, drawn.ids_B[index]]
        assert chance > 0
        assert float(drawn.drawn_logprobs_B[index]) == pytest.approx(math.log(chance), abs=1e-6)


@pytest.mark.parametrize("size", [32_000, 50_257])
@pytest.mark.parametrize("threads", [1, 2])
def test_large_vocabularies_do_not_split_a_row_otherwise(
    size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.infer.sampling._AT_ONCE", 2 * size)
    logits_BV = torch.randn(9, size, generator=torch.Generator().manual_seed(size)) * 4
    told = [Row(Asked(logprobs=2, top_p=[1.0, 0.9, 0.999][i % 3], min_p=0.01 * (i % 2)), i, 3) for i in range(9)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = sample_batch(logits_BV, SamplingBatch(told))
        for index, row in enumerate(told):
            alone = sample_batch(logits_BV[index : index + 1].clone(), SamplingBatch([row]))
            for name in ("ids_B", "logprobs_B", "drawn_logprobs_B", "top_ids_BN", "top_logprobs_BN"):
                assert torch.equal(getattr(whole, name)[index], getattr(alone, name)[0]), name
    finally:
        torch.set_num_threads(before)


def test_what_transformers_would_keep_is_kept() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits_BV = torch.randn(60, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float() * 4
    for index, scores_V in enumerate(logits_BV):
        asked = Asked([0.5, 1.0, 1.7][index % 3], [0, 3, 50][index % 5 % 3], [1.0, 0.9, 0.3][index % 7 % 3])
        asked = replace(asked, min_p=[0.0, 0.02][index % 2])
        scores_1V = processors.TemperatureLogitsWarper(asked.temperature)(None, scores_V[None])
        if asked.top_k:
            scores_1V = processors.TopKLogitsWarper(asked.top_k)(None, scores_1V)
        if asked.top_p < 1:
            scores_1V = processors.TopPLogitsWarper(asked.top_p)(None, scores_1V)
        if asked.min_p:
            scores_1V = processors.MinPLogitsWarper(asked.min_p)(None, scores_1V)
        probs_V = distribution(scores_V[None], SamplingBatch([Row(asked)]))[0]
        expected_V = scores_1V[0].double().softmax(0)
        assert torch.allclose(probs_V, expected_V, rtol=1e-5, atol=1e-9)
        if asked.top_k or asked.top_p < 1 or asked.min_p:
            assert torch.equal(probs_V > 0, expected_V > 0)


def test_penalties_are_those_of_transformers_and_openai() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3
    prompt, text = [4, 9, 9, 30], [9, 7, 7, 7, 41]
    row = Row(Asked(repetition_penalty=1.4), history=History(prompt, text))
    expected = processors.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt + text]), logits_V[None])
    assert torch.equal(SamplingBatch([row]).scores(logits_V[None]), expected)
    row = replace(row, settings=Asked(presence_penalty=0.5, frequency_penalty=0.25))
    expected_V = logits_V.clone()
    for token in set(text):
        expected_V[token] -= 0.5 + 0.25 * text.count(token)
    assert torch.equal(SamplingBatch([row]).scores(logits_V[None])[0], expected_V)
    row = replace(row, settings=Asked(logit_bias=((5, 2.0),)), banned=(8,))
    scores_V = SamplingBatch([row]).scores(logits_V[None])[0]
    assert scores_V[5] == logits_V[5] + 2
    assert scores_V[8] == -math.inf


@settings(max_examples=50, deadline=None)
@given(*[st.lists(st.integers(0, 300), max_size=150)] * 3)
def test_a_history_counts(prompt: list[int], text: list[int], drafts: list[int]) -> None:
    history = History(prompt, text)
    before = [one.clone() for one in history.pairs()]
    ids_N, counts_N = history.pairs(drafts)
    assert set(ids_N.tolist()) == {*prompt, *text, *drafts}
    assert len(ids_N) == len(set(ids_N.tolist()))
    for token, count in zip(ids_N.tolist(), counts_N.tolist(), strict=True):
        assert count == (text + drafts).count(token)
    assert all(torch.equal(*pair) for pair in zip(before, history.pairs(), strict=True))


def test_masks_of_bits_and_bools_allow_the_same() -> None:
    size = 70
    allowed_V = torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.5
    words = [0, 0, 0]
    for token in allowed_V.nonzero()[:, 0].tolist():
        words[token // 32] |= 1 << token % 32
    bits = torch.tensor([w - (1 << 32) if w >> 31 else w for w in words], dtype=torch.int32)
    logits_1V = torch.randn(1, size)
    told = [SamplingBatch([Row(Asked(), mask=m)]).scores(logits_1V) for m in (allowed_V, bits, allowed_V[:40])]
    assert torch.equal(told[0], logits_1V.masked_fill(~allowed_V, -math.inf))
    assert torch.equal(told[0], told[1])
    assert torch.equal(told[2][:, :40], told[0][:, :40])
    assert told[2][:, 40:].max() == -math.inf


@pytest.mark.parametrize("asked", [Asked(0), Asked(), Asked(top_p=0.9), Asked(top_k=5), Asked(min_p=0.1)], ids=str)
@pytest.mark.parametrize("bad", ["nan", "one nan", "inf", "nothing allowed"])
def test_one_bad_row_fails_alone(asked: Asked, bad: str) -> None:
    logits_BV = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    told = [Row(asked, seed) for seed in range(3)]
    good = sample_batch(logits_BV, SamplingBatch(told))
    if bad == "nothing allowed":
        told[1] = replace(told[1], mask=torch.zeros(600, dtype=torch.bool))
    else:
        logits_BV[1, 4 if bad == "one nan" else slice(None)] = math.nan
        if bad == "inf":
            logits_BV[1] = 0
            logits_BV[1, 77] = math.inf
    out = sample_batch(logits_BV, SamplingBatch(told))
    assert out.ok_B.tolist() == [True, False, True]
    assert out.ids_B[[0, 2]].tolist() == good.ids_B[[0, 2]].tolist()


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits_BV = torch.tensor([[1.0, 7.0, 7.0, 2.0], [-5.0, -5.0, -5.0, -9.0]])
    for told in ([Asked(0), Asked(0)], [Asked(0), Asked(top_k=1)], [Asked(1e-7), Asked(top_k=1, temperature=2)]):
        assert sample_batch(logits_BV, SamplingBatch([Row(a) for a in told])).ids_B.tolist() == [1, 0]
    mixed = [Row(Asked(0)), Row(Asked(0)), Row(Asked())]
    assert sample_batch(logits_BV[[0, 1, 0]], SamplingBatch(mixed)).ids_B.tolist()[:2] == [1, 0]


def test_logprobs_are_the_models_own() -> None:
    logits_BV = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) * 3
    asked = Asked(temperature=0.5, top_k=20, logprobs=4)
    out = sample_batch(logits_BV, SamplingBatch([Row(asked, 1), Row(Asked(0))]))
    expected_V = logits_BV[0].log_softmax(0)
    assert torch.allclose(out.logprobs_B[0], expected_V[out.ids_B[0]], atol=1e-5)
    best_N, ids_N = expected_V.topk(4)
    assert out.top_ids_BN[0].tolist() == ids_N.tolist()
    assert torch.allclose(out.top_logprobs_BN[0], best_N, atol=1e-5)
    assert out.logprobs_B[1].isnan()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(0, 6), min_size=20, max_size=200))
def test_the_largest_of_equals_have_the_lowest_ids(count: int, values: list[int]) -> None:
    best, ids = largest(torch.tensor([values], dtype=torch.float32), count)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert ids[0].tolist() == expected
    assert best[0].tolist() == [values[i] for i in expected]


def test_splitmix_is_the_published_one() -> None:
    # The first numbers of seed 1234567, from Rosetta Code's task "Pseudo-random numbers/Splitmix64".
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = splitmix(torch.full((4,), 1234567), torch.arange(4))
    assert [one % 2**64 for one in found.tolist()] == expected


def _chi_square(counts: torch.Tensor) -> float:
    """Standard deviations from what uniform counts give."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_numbers_are_uniform_and_independent() -> None:
    count, cells = 1 << 18, 64
    near_N, one_N = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    series = [uniform(one_N + 5, near_N), uniform(near_N, one_N), uniform(near_N, one_N + 9, DRAFT)]
    # Of consecutive positions and seeds, and of the draws of one position: single numbers and pairs.
    pairs = [(s[:-1], s[1:]) for s in series]
    pairs += [(series[0], uniform(one_N + 5, near_N, other)) for other in (DRAFT, ACCEPT)]
    pairs += [(series[0], uniform(one_N + 6, near_N)), (series[0][:-7], series[0][7:])]
    for first, second in pairs:
        assert 0 <= first.min() <= first.max() < 1
        cells_N = (first * cells).long() * cells + (second * cells).long()
        assert abs(_chi_square(cells_N.bincount(minlength=cells * cells).double())) < 4.5
        for bits in (8, 40):
            low_N = (first * 2.0**bits % 1 * 256).long()
            assert abs(_chi_square(low_N.bincount(minlength=256).double())) < 4.5


@pytest.mark.parametrize(
    "asked", [Asked(), Asked(0.6, 7), Asked(1.3, top_p=0.8), Asked(min_p=0.2), Asked(2.0, 9, 0.9, 0.1)], ids=str
)
def test_tokens_come_as_often_as_they_should(asked: Asked) -> None:
    logits_V = torch.randn(20, generator=torch.Generator().manual_seed(2)) * 1.5
    count = 20_000
    told = [Row(asked, seed=7 + i % 3, position=i) for i in range(count)]
    out = sample_batch(logits_V.expand(count, -1), SamplingBatch(told))
    counts_V = out.ids_B.bincount(minlength=20).double()
    probs_V = reference(logits_V, told[0])
    assert not counts_V[probs_V == 0].any()
    some = probs_V > 0
    freedom = int(some.sum()) - 1
    chi = ((counts_V - count * probs_V)[some] ** 2 / (count * probs_V[some])).sum()
    assert abs(float(chi) - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_choices_have_their_own_seeds() -> None:
    assert seed_of_choice(42, 0) == 42
    assert len({seed_of_choice(seed, i) for seed in range(50) for i in range(20)}) == 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (n, v)
            for n in ("temperature", "top_p", "min_p", "repetition_penalty")
            for v in (-1.0, math.nan, math.inf)
        ],
        ("top_p", 0.0),
        ("top_k", -1),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("logit_bias", ((100, 1.0),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("logprobs", -1),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, value) -> None:
    Asked().check_vocabulary(100)
    with pytest.raises(ValueError, match=name):
        replace(Asked(), **{name: value}).check_vocabulary(100)


def test_logits_must_fit_the_rows() -> None:
    for logits in (torch.zeros(1, 4), torch.zeros(2, 0), torch.zeros(4), torch.zeros(2, 1 << 20, dtype=torch.int8)):
        with pytest.raises(ValueError, match="do not fit 2 rows"):
            sample_batch(logits, SamplingBatch([Row(Asked()), Row(Asked())]))


def test_uniform_needs_no_batch() -> None:
    seeds, places = torch.tensor([1, 2, -(2**63)]), torch.tensor([0, 5, 2**40])
    whole = uniform(seeds, places, SAMPLE)
    assert whole.tolist() == [float(uniform(s[None], p[None], SAMPLE)) for s, p in zip(seeds, places, strict=True)]


def test_one_number_leads_to_one_token_whichever_way_it_is_found() -> None:
    size, count = 700, 60
    logits_BV = torch.randn(count, size, generator=torch.Generator().manual_seed(5)).bfloat16().float()
    few_BV = logits_BV.clone()
    few_BV[:, torch.arange(size) % 7 != 0] = -math.inf  # 100 are left: fewer than the candidates that are looked at
    for asked, scores_BV in ((Asked(top_k=size), logits_BV), (Asked(top_k=100), few_BV), (Asked(top_k=300), few_BV)):
        one, two = (
            sample_batch(scores_BV, SamplingBatch([Row(settings, seed) for seed in range(count)])).ids_B
            for settings in (asked, Asked())
        )
        assert torch.equal(one, two)
