"""Experts per layer: the paper's pyramids, and lists written by hand."""

import pytest

from coterie.moe.pyramid import parse, pyramid, spread, validate


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ((24, 2, 32, 64, 2), [32] * 10 + [64] * 2),  # 350M PR-MoE-32/64
        ((24, 2, 64, 128, 2), [64] * 10 + [128] * 2),  # 1.3B PR-MoE-64/128
        ((21, 2, 32, 64, 2), [32] * 8 + [64] * 2),  # their students of 21 layers have ten entries
        ((21, 2, 64, 128, 2), [64] * 8 + [128] * 2),
        ((12, 2, 64, 64, 0), [64] * 6),
        ((3, 1, 4, 8, 3), [8, 8, 8]),
    ],
)
def test_pyramids_of_the_paper(arguments: tuple[int, ...], counts: list[int]) -> None:
    layers, interval, *_ = arguments
    experts = pyramid(*arguments)
    assert len(experts) == layers
    assert [e for e in experts if e] == counts
    assert [i for i, e in enumerate(experts) if e] == list(range(interval - 1, len(counts) * interval, interval))


def test_small_pyramid_in_full() -> None:
    assert pyramid(7, 2, 2, 4, 1) == (0, 2, 0, 2, 0, 4, 0)
    assert pyramid(7, 3, 2, 4, 1) == (0, 0, 2, 0, 0, 4, 0)
    assert pyramid(1, 2, 2, 4, 0) == (0,)


def test_lists_by_hand() -> None:
    assert parse("32x10,64x2", 24, 2) == pyramid(24, 2, 32, 64, 2)
    assert parse("0, 8, 0, 16", 4) == (0, 8, 0, 16)
    assert parse("0x2,4", 3) == (0, 0, 4)
    assert spread([3, 5], 5, 2) == (0, 3, 0, 5, 0)
    assert validate([0, 2], 2, top_k=2) == (0, 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: pyramid(24, 2, 32, 64, 13), "have 12 MoE layers, so last_count=13"),
        (lambda: pyramid(24, 0, 32, 64, 0), "interval 0"),
        (lambda: pyramid(4, 2, -1, 4, 1), "layer 1 has -1 experts"),
        (lambda: spread([4] * 12, 21, 2), "have 10 MoE layers, but 12"),
        (lambda: parse("32x10,64y2", 24, 2), "'64y2' is not a count"),
        (lambda: parse("", 2), "is not a count"),
        (lambda: parse("4x", 1), "'4x' is not a count"),
        (lambda: validate([4], 2), "1 entries, but the model has 2 layers"),
        (lambda: validate([0, 2, 8], 3, top_k=4), "layer 1 has 2 experts, but top_k=4"),
    ],
)
def test_mistakes_are_named(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
