"""Draft tokens change the time a text takes, not its distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import ASKED

from coterie.infer.penalties import History
from coterie.infer.request import SamplingParams as Asked
from coterie.infer.sampling import Row, SamplingBatch, distribution, draw, reference, sample_batch
from coterie.infer.speculative import accept, draft_uniform, rows_for

SIZE = 6
# A model whose logits depend on the last token alone, and one that drafts.
GENERATOR = torch.Generator().manual_seed(4)
TARGET_VV, DRAFT_VV = torch.randn(2, SIZE, SIZE, generator=GENERATOR) * 1.3


class Placed(SamplingBatch):
    """Rows whose random numbers are told: those for accepting, and those for drawing."""

    accepting: torch.Tensor
    drawing: torch.Tensor

    def uniform(self, rows, draw, device):
        return (self.accepting if draw == 2 else self.drawing)[rows][:, None]


@pytest.mark.parametrize("asked", [Asked(), Asked(0.7, 3), Asked(top_p=0.7), Asked(0)], ids=str)
def test_the_rule_gives_the_targets_distribution_exactly(asked: Asked) -> None:
    grid = 80  # all pairs of random numbers on a grid, for each draft: an integral, not a sample
    p_V, q_V = reference(TARGET_VV[0], Row(asked)), DRAFT_VV[0].double().softmax(0)
    marks = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    count = grid * grid
    found_V = torch.zeros(SIZE, dtype=torch.float64)
    for token in range(SIZE):
        batch = Placed([Row(asked)] * (2 * count))
        batch.accepting = marks.repeat_interleave(grid).repeat_interleave(2)
        batch.drawing = marks.repeat(grid).repeat_interleave(2)
        out = accept([[token]] * count, TARGET_VV[0].expand(2 * count, -1), batch, q_V.expand(count, -1))
        firsts = torch.tensor([one[0] for one in out])
        found_V += q_V[token] * firsts.bincount(minlength=SIZE) / count
    assert (found_V - p_V).abs().max() < 3 / grid


@pytest.mark.parametrize("asked", [Asked(), Asked(0.7, 3), Asked(1.5, top_p=0.8, min_p=0.05)], ids=str)
@pytest.mark.parametrize("kind", ["model", "one-hot"])
def test_two_tokens_come_as_often_as_without_drafts(asked: Asked, kind: str) -> None:
    count = 12_000
    q_VV = DRAFT_VV.double().softmax(-1)
    starts = [Row(asked, seed=i, position=3) for i in range(count)]
    drafts, probs = torch.zeros(count, 2, dtype=torch.int64), []
    last_Q = torch.zeros(count, dtype=torch.int64)
    for step in range(2):
        rows = SamplingBatch([rows_for(row, [0, 0])[step] for row in starts])
        if kind == "model":
            last_Q = draw((q_VV[last_Q] * 2**34).round(), draft_uniform(rows, q_VV.device))[0]
        else:
            last_Q = DRAFT_VV[last_Q].argmax(-1)
        probs.append(q_VV[drafts[:, step - 1] if step else torch.zeros_like(last_Q)])
        drafts[:, step] = last_Q
    told = drafts.tolist()
    rows = [one for row, mine in zip(starts, told, strict=True) for one in rows_for(row, mine)]
    logits_RV = TARGET_VV[torch.cat([torch.zeros(count, 1, dtype=torch.int64), drafts], 1).flatten()]
    probs_DV = torch.stack(probs, 1).flatten(0, 1) if kind == "model" else None
    out = accept(told, logits_RV, SamplingBatch(rows), probs_DV)
    short = [i for i, tokens in enumerate(out) if len(tokens) == 1]
    again = SamplingBatch([rows_for(starts[i], [0])[1] for i in short])
    for i, token in zip(
        short, sample_batch(TARGET_VV[[out[i][0] for i in short]], again).ids_B.tolist(), strict=True
    ):
        out[i].append(token)
    assert {len(tokens) for tokens in out} == {2, 3}
    pairs = torch.tensor([tokens[0] * SIZE + tokens[1] for tokens in out]).bincount(minlength=SIZE * SIZE)
    p_VV = torch.stack([reference(TARGET_VV[i], starts[0]) for i in range(SIZE)])
    expected = (p_VV[0][:, None] * p_VV).flatten() * count
    assert not pairs[expected == 0].any()
    some = expected > 0
    chi, freedom = ((pairs - expected)[some] ** 2 / expected[some]).sum(), int(some.sum()) - 1
    assert abs(float(chi) - freedom) < 4.5 * math.sqrt(2 * freedom)


@settings(max_examples=60, deadline=None)
@given(ASKED, st.integers(0, 2**64 - 1), st.lists(st.lists(st.integers(0, 35), max_size=4), min_size=1, max_size=8))
def test_sure_drafts_leave_a_seeds_text_as_it_was(asked: Asked, seed: int, guesses: list[list[int]]) -> None:
    logits_VV = torch.randn(36, 36, generator=torch.Generator().manual_seed(seed % 1000)) * 2
    plain, history = [0], History([0])
    for position in range(12):
        row = Row(asked, seed, position, history)
        plain.append(int(sample_batch(logits_VV[plain[-1:]], SamplingBatch([row])).ids_B))
        history.add(plain[-1])
    fast, history = [0], History([0])
    for step in range(12):
        if len(fast) >= len(plain):
            break
        # Every other draft is what will come, so that some are accepted.
        drafts = guesses[step % len(guesses)] if step % 2 else plain[len(fast) : len(fast) + 3]
        rows = rows_for(Row(asked, seed, len(fast) - 1, history), drafts)
        (new,) = accept([drafts], logits_VV[[fast[-1], *drafts]], SamplingBatch(rows))
        assert step % 2 or len(new) == len(drafts) + 1
        for token in new:
            fast.append(token)
            history.add(token)
    assert fast[: len(plain)] == plain[: len(fast)]


def test_a_draft_that_is_the_model_is_always_accepted() -> None:
    asked = Asked(0.8, 4)
    rows = [Row(asked, seed) for seed in range(500) for _ in range(2)]
    logits_RV = torch.randn(1000, 30, generator=torch.Generator().manual_seed(1))
    probs_DV = distribution(logits_RV, SamplingBatch(rows))[::2]
    drafts = probs_DV.argmax(-1)[:, None].tolist()
    assert {len(one) for one in accept(drafts, logits_RV, SamplingBatch(rows), probs_DV)} == {2}


@pytest.mark.parametrize("probs", [False, True])
def test_a_failed_row_ends_its_request_alone(probs: bool) -> None:
    logits_RV = torch.zeros(6, 9)
    logits_RV[:, 0] = 50
    logits_RV[1] = math.nan
    probs_DV = torch.nn.functional.one_hot(torch.zeros(4, dtype=torch.int64), 9).double() if probs else None
    out = accept([[0, 0], [0, 0]], logits_RV, SamplingBatch([Row(Asked())] * 6), probs_DV)
    assert out == [[0], [0, 0, 0]]


def test_drafts_must_fit_the_rows() -> None:
    batch = SamplingBatch([Row(Asked())] * 3)
    with pytest.raises(ValueError, match="need 4 rows, not 3"):
        accept([[1, 2], [3][:0]], torch.zeros(3, 5), batch)
    with pytest.raises(ValueError, match=r"draft_probs of shape \[1, 5\]"):
        accept([[1, 2]], torch.zeros(3, 5), batch, torch.ones(1, 5))
