"""Decode steps on paper: the formulas by hand and against others, what more of a thing does, and the paper."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.benchmarks import latency
from coterie.benchmarks.rows import read
from coterie.infer.latency import ENDS_CALLS, held, loads, predict
from coterie.infer.latency_ways import Pace, Served, experts_ways
from coterie.models.config import ModelConfig
from coterie.models.params import count_params
from coterie.models.presets import PRESETS
from coterie.moe.config import MoEConfig
from coterie.parallel.cost import Batch, Links, Rate, Rings, choose_exchange
from coterie.parallel.layout import Layout, fill
from coterie.parallel.traffic import Nodes
from coterie.train.machines import MACHINES

SLOW = Rate(1e-3, 1e6, 1e-4)
FAR = Rate(2e-3, 1e5, 1e-3)
PACE = Pace(memory_rate=1e6, flops=1e12, links=Links(SLOW, FAR))
ONE = Served(sequences=3, context=5, node=8)


def tiny(**other) -> ModelConfig:
    moe = MoEConfig(top_k=1, hidden=16, activation="gelu")
    given = ModelConfig(
        vocab_size=12,
        max_positions=32,
        layers=2,
        dim=8,
        heads=4,
        hidden=16,
        activation="gelu",
        experts=(0, 4),
        moe=moe,
    )
    return replace(given, **other)


def test_one_rank_by_hand() -> None:
    step = predict(tiny(), Layout(), PACE, ONE)
    keys = 3 * 5 * 2 * 8 * 2
    assert step.attention.bytes == 2 * (4 * 8 * 8 * 2 + keys)
    assert step.dense.bytes == 2 * 8 * 16 * 2
    read = 4 * (1 - 0.75**3)  # distinct experts that three tokens choose among four
    assert step.experts.bytes == pytest.approx(read * 2 * 8 * 16 * 2 + 4 * 8 * 2)
    assert step.ends.bytes == 12 * 8 * 2
    assert step.seconds == pytest.approx(step.total.bytes / 1e6)
    assert step.ways == ("local",)
    assert step.attention.flops == 2 * 3 * (2 * 4 * 8 * 8 + 4 * 5 * 8)
    assert step.dense.flops == 2 * 3 * 2 * 8 * 16
    assert step.experts.flops == pytest.approx(2 * 3 * (2 * 8 * 16 + 4 * 8))


def test_flops_count_where_they_take_longer_and_calls_come_on_top() -> None:
    step = predict(tiny(), Layout(), PACE._replace(memory_rate=1e12, flops=1e3, call=0.5, row=0.25), ONE)
    assert step.total.compute == pytest.approx(step.total.flops / 1e3)
    assert step.total.start == step.total.calls * 0.5 > ENDS_CALLS
    assert step.total.control == 3 * 0.25


def test_tensor_parallelism_by_hand() -> None:
    step = predict(tiny(), Layout(tp=4), PACE, ONE)
    total = 1e-3 + 2 * 3 * 1e-4 + 2 * 3 * (3 * 8 * 2 / 4) / 1e6
    assert step.attention.tensor == pytest.approx(2 * total)
    assert step.dense.tensor == pytest.approx(total)
    gather = 1e-3 + 3 * 1e-4 + 3 * (3 * 12 * 2 / 4) / 1e6
    assert step.ends.tensor == pytest.approx(total + gather)
    assert step.ends.control == pytest.approx(1e-3 + 2 * 1e-4)
    one = predict(tiny(), Layout(), PACE, ONE)
    assert step.attention.bytes == one.attention.bytes / 4
    assert step.dense.bytes == one.dense.bytes / 4
    assert step.experts.bytes == one.experts.bytes, "experts that are not cut are computed by every rank"
    assert step.ways == ("local",)


def test_experts_of_one_lane_cost_one_sum() -> None:
    ways = experts_ways(tiny(), 4, Layout(tp=4, ep=2, etp=2), PACE, ONE)
    assert ways == {"summed": pytest.approx(1e-3 + 6e-4 + 6 * 12 / 1e6)}


def test_gathered_by_hand() -> None:
    ways = experts_ways(tiny(), 4, Layout(dp_shard=4, ep=4), PACE, ONE)
    there, home = (1e-3 + 3e-4 + 3 * 3 * row / 1e6 for row in (16 + 8, 16))
    assert ways["gathered"] == pytest.approx(there + home)
    assert list(ways) == ["gathered", "flat"], "on one node only the flat exchange is a choice"


def test_ranks_of_a_lane_share_its_tokens_and_slices_their_rows() -> None:
    layout, asked = fill(8, tp=2, ep=4, etp=2), Served(4, 5, 4)
    ways = experts_ways(tiny(), 4, layout, PACE, asked)
    lane = 1e-3 + 1e-4 + 2 * 16 / 1e6  # two of the four tokens are each rank's
    plain = choose_exchange(Batch(2, 8, 1, 4, 2), Nodes(2, 2), PACE.links._asdict(), backward=False).predictions
    slices = 2 * (1e-3 + 1e-4 + 2 * 16 / 1e6)
    assert {name: ways[name] - lane - slices for name in plain} == pytest.approx(plain)
    apart = predict(tiny(), layout, PACE, asked)
    assert apart.experts.exchange == min(ways.values())
    rows = 4 * 4 / 4  # of four lanes' tokens over four shares of one expert each
    assert apart.experts.flops == 2 * (rows * 256 / 2 + 4 * 4 * 8)
    assert apart.ways == (min(ways, key=lambda name: ways[name]),)


def test_rings_have_their_own_links_where_they_are_given() -> None:
    none = Links(Rate(0, 1e30), Rate(0, 1e30))
    pace = PACE._replace(rings=Rings(none, none, Links(Rate(7.0, 1e30), FAR)))
    step = predict(tiny(), Layout(tp=4), pace, ONE)
    assert step.total.tensor == pytest.approx(4 * 7.0)


def test_a_rank_holds_what_the_model_has() -> None:
    shared = MoEConfig(top_k=2, shared_hidden=24, shared_gate=True)
    for name in ("gpt-1.3b-pr-moe", "small-moe", "tiny-pr-moe", "tiny-dense"):
        for config in (PRESETS[name](), replace(PRESETS[name](), moe=shared)):
            keys = 3 * 5 * 2 * config.num_kv_heads * config.width_per_head * config.layers
            assert held(config, Layout(), ONE) == 2 * (count_params(config).total + keys)
    config = tiny()
    experts = count_params(config).experts
    assert held(config, Layout(), ONE) - held(config, Layout(dp_shard=4, ep=4), ONE) == 2 * experts * 3 / 4


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_loads_against_drawn_routes(power: float) -> None:
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 65) ** power
    drawn = np.stack(
        [(np.log(weights) + rng.gumbel(size=(2000, 16, 64)))[:, t].argsort(1)[:, -4:] for t in range(16)], 1
    )
    hit_SE = np.zeros((2000, 64), bool)
    np.put_along_axis(hit_SE, drawn.reshape(2000, -1), True, 1)
    chances_E = np.bincount(drawn.ravel(), minlength=64) / (2000 * 16)
    read_SP = hit_SE.reshape(2000, 8, 8).sum(2)
    load = loads(chances_E, 16, 8)
    assert load.mean == pytest.approx(read_SP.mean(), rel=0.01)
    assert load.busiest == pytest.approx(read_SP.max(1).mean(), rel=0.04)
    assert load.rows == pytest.approx(16 * chances_E[:8].sum() if power else 16 * 4 / 8, rel=0.04)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_loads_have_their_bounds(shares: int, each: int, tokens: int, seed: int) -> None:
    chances_E = np.random.default_rng(seed).random(shares * each)
    load, more = loads(chances_E, tokens, shares), loads(chances_E, tokens + 1, shares)
    assert 0 <= load.mean <= load.busiest + 1e-9 <= each + 2e-9
    assert load.mean <= more.mean + 1e-12
    assert load.busiest <= more.busiest + 1e-9
    even = np.full(len(chances_E), chances_E.mean())
    assert load.mean <= loads(even, tokens, shares).mean + 1e-9, "skewed routing visits fewer experts"


LAYOUTS = [Layout(), Layout(tp=4), Layout(dp_shard=4, ep=4), fill(8, tp=2, ep=4), fill(8, tp=2, ep=4, etp=2)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LAYOUTS), st.integers(1, 20), st.integers(1, 50), st.sampled_from([2, 4, 8]))
def test_more_work_takes_longer_and_a_faster_machine_less(
    layout: Layout, sequences: int, context: int, node: int
) -> None:
    asked, pace = Served(sequences, context, node), PACE._replace(flops=1e7, call=1e-6, row=1e-6)
    step = predict(tiny(), layout, pace, asked)
    for more in ({"sequences": sequences + layout.tp}, {"context": context + 1}, {"element_bytes": 4}):
        assert predict(tiny(), layout, pace, asked._replace(**more)).seconds > step.seconds
    fast = Links(*(Rate(r.latency / 2, 2 * r.bandwidth, r.message / 2) for r in pace.links))
    for better in ({"memory_rate": 2e6}, {"flops": 2e7}, {"call": 0.0}, {"row": 0.0}, {"links": fast}):
        assert predict(tiny(), layout, pace._replace(**better), asked).seconds <= step.seconds
    for way in ("gathered", "flat"):
        forced = predict(tiny(), layout, pace, asked._replace(exchange=way)).seconds
        assert forced >= step.seconds - 1e-12, "the chosen way is the fastest"


def test_a_hot_rank_is_what_a_step_waits_for() -> None:
    config, layout = tiny(experts=(8, 8)), Layout(dp_shard=4, ep=4)
    spread_E, hot_E = np.array([0.4, 0.0] * 2 + [0.1, 0.0] * 2), np.array([0.4, 0.4, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0])
    spread, hot = (predict(config, layout, PACE, ONE, [chances_E] * 2) for chances_E in (spread_E, hot_E))
    assert hot.experts.bytes > 1.5 * spread.experts.bytes


@pytest.mark.parametrize(
    ("layout", "asked", "chances", "said"),
    [
        (Layout(tp=3), ONE, None, "tp=3 does not divide heads 4"),
        (Layout(dp_shard=4, ep=4), ONE._replace(exchange="hierarchical"), None, "not one of auto, gathered, flat"),
        (Layout(), ONE, [np.full(3, 1 / 3)], "MoE layers of [4] experts"),
        (Layout(), ONE, [np.array([2.0, 0, 0, 0])], "chances between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_said(layout: Layout, asked: Served, chances, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        predict(tiny(), layout, PACE, asked, chances)


def test_the_papers_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    steps = {
        (case.model, gpus, name): latency.step_of(case, gpus, MACHINES[name])
        for case in latency.CASES
        for gpus in case.gpus
        for name in latency.GPUS
    }
    for (_, gpus, name), step in steps.items():
        assert step.held < 0.9 * MACHINES[name].memory
        assert gpus < 64 or step.ways[0] == "hierarchical"
    trillion = steps["gpt-24b-moe-128", 256, "a100-80"]
    assert 12e-3 < trillion.seconds < 25e-3, "the paper: under 25 ms"
    lanes = [steps["gpt-1.3b-moe-128", gpus, "a100-80"] for gpus in (8, 16, 32, 64)]
    apart = [step.seconds - step.total.control for step in lanes]
    assert apart == sorted(apart, reverse=True), "the paper: more GPUs read fewer experts each, and each does more"
    latency.main(json=tmp_path / "rows.json")
    printed = capsys.readouterr().out.strip()
    assert printed in (Path(__file__).parents[1] / "docs" / "latency.md").read_text(), "docs/latency.md shows another"
    assert [row.value for row in read(tmp_path / "rows.json")] == [step.seconds * 1e3 for step in steps.values()]
