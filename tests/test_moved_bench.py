"""What the benchmark of moved experts says of a step is what the step does."""

import numpy as np
import pytest

from coterie.benchmarks import moved
from coterie.infer.placement import Cluster, round_robin
from coterie.infer.placement_plan import plan
from coterie.infer.placement_score import PREFILL, score
from coterie.parallel.cost import Rate

RATES = {"intra": Rate(1e-4, 1e9), "inter": Rate(1e-3, 1e8)}


def test_a_plan_crosses_less_and_is_predicted_to_be_faster() -> None:
    model = moved.topical().eval()
    seen, judged = moved.routes(model, range(2)), moved.routes(model, range(50, 52))
    cluster = Cluster(moved.NODES, moved.PER_NODE, moved.EXPERTS // 4 + 2)
    first = round_robin([moved.EXPERTS] * moved.LAYERS, cluster)
    wanted = plan(seen, cluster, PREFILL)
    before, after = score(first, judged), score(wanted, judged)
    assert after.crossings < 0.8 * before.crossings
    assert after.imbalance < before.imbalance
    for way in ("flat", "deduplicated"):
        assert moved.exchange_seconds(way, wanted, judged, RATES) < moved.exchange_seconds(way, first, judged, RATES)
    assert moved.exchange_seconds("gathered", first, judged, RATES) == 0


def test_prompts_have_one_topic_and_some_are_asked_for_more() -> None:
    topics = [set(np.array(prompt) % moved.TOPICS) for seed in range(20) for prompt in moved.prompts(seed)]
    assert {len(topic) for topic in topics} == {1}
    counts = np.bincount([topic.pop() for topic in topics], minlength=moved.TOPICS)
    assert counts[0] > 2 * counts[-1]


@pytest.mark.long
def test_the_benchmark_runs_on_pretended_hosts() -> None:
    rows = moved.main(quick=True, netns=False)
    assert {row.impl for row in rows if row.metric == "step"} == {"as at first", "planned"}
