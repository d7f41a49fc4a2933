"""Layouts as numbers: what divides what, what is refused, and which come nearest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.parallel.layout import ExpertLayout, Layout, Sizes, divisors, feasible, fill, near

SIZES = Sizes(heads=16, kv_heads=4, hidden=96, vocab=50257, experts=(32, 64, 128), expert_hidden=64)


def test_the_papers_pyramid_uses_every_rank_in_every_layer() -> None:
    layout = fill(128, ep=128)
    assert [layout.experts(count) for count in (32, 64, 128)] == [(4, 32, 1), (2, 64, 1), (1, 128, 1)]
    assert list(layout.problems(SIZES)) == []


def test_expert_slices_take_the_ranks_that_experts_leave() -> None:
    assert fill(16, ep=4, etp=2).experts(4) == ExpertLayout(2, 4, 2)


@pytest.mark.parametrize(
    ("world", "degrees", "message"),
    [
        (8, {"tp": 3}, "tp=3 does not divide 8 ranks: the nearest that does is 2 or 4"),
        (8, {"tp": 0}, "tp=0: give 1 or more"),
        (8, {"dp_shard": 3, "tp": 2}, "dp_replicate=1 x dp_shard=3 x tp=2 does not make 8 ranks: dp_shard=4 would"),
        (8, {"dp_replicate": 4, "tp": 4}, "dp_replicate=4 x tp=4 does not make 8 ranks"),
        (8, {"ep": 8, "etp": 2}, "ep=8 x etp=2 does not divide 8 ranks: the nearest that does is 4 for ep"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest(world: int, degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fill(world, **degrees)


def test_experts_that_do_not_spread_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"6 experts do not spread over ep=4 of 8 places .* nearest that does is 2"):
        fill(8, ep=4).experts(6)


def test_a_model_rules_layouts_out_by_name() -> None:
    found = list(fill(8, tp=8).problems(SIZES))
    assert len(found) == 1
    assert found[0].startswith("tp=8 does not divide kv_heads 4")


@given(st.integers(1, 64), st.sampled_from([(), (4,), (2, 8), (3, 6, 12)]))
def test_feasible_layouts_are_sound_and_hold_every_rank_once(world: int, experts: tuple[int, ...]) -> None:
    sizes = SIZES._replace(experts=experts)
    found = feasible(world, sizes)
    assert Layout(1, world) in found
    assert len(set(found)) == len(found)
    for layout in found:
        assert layout.world == world
        assert fill(world, dp_replicate=layout.dp_replicate, tp=layout.tp, ep=layout.ep, etp=layout.etp) == layout
        for count in experts:
            edp, ep, etp = layout.experts(count)
            assert edp * ep * etp == world
            assert count % ep == 0


@given(st.integers(1, 300), st.integers(1, 300))
def test_near_names_the_closest_on_both_sides(value: int, number: int) -> None:
    fitting = [d for d in divisors(number) if d != value]
    named = [int(word) for word in near(value, fitting).split() if word.isdigit()]
    assert all(not any(min(value, n) < f < max(value, n) for f in fitting) for n in named)
    assert len(named) == (min(fitting, default=value) < value) + (max(fitting, default=value) > value)
