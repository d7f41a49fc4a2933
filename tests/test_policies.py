"""The benchmark of policies: what it counts, and that it runs."""

import json

import pytest

from coterie.benchmarks import policies
from coterie.benchmarks.rows import Row
from coterie.benchmarks.serving_metrics import Trace


def trace(ttft: float, gap: float, prompt: int = 512, count: int = 10, error: str = "") -> Trace:
    chunks = tuple((ttft + i * gap, 1) for i in range(count))
    return Trace(prompt, count, 0.0, 0.0, chunks, count, error)


def test_effective_throughput_counts_the_content() -> None:
    traces = [trace(0.9, 0.1), trace(0.9, 0.2), trace(0.9, 0.4), trace(1.1, 0.1), trace(0.1, 0.1, error="gone")]
    told = policies.numbers(traces, 2.0)
    assert told["throughput"] == (2.0, "req/s")
    assert [told[f"effective_{rate}"][0] for rate in (2, 4, 6)] == [1.5, 1.0, 0.5]
    assert told["itl_p50"] == (pytest.approx(150), "ms")
    assert told["ttft_p50"] == (pytest.approx(900), "ms")


def test_every_policy_meets_the_same_requests() -> None:
    case = policies.CASES[0]
    assert case.lengths(0, 2048) == case.lengths(0, 2048) != case.lengths(1, 2048)
    many = [pair for seed in range(40) for pair in case.lengths(seed, 2048)]
    assert sum(prompt for prompt, _ in many) / len(many) == pytest.approx(case.prompt, rel=0.05)
    assert all(1 <= prompt <= 1024 and 2 <= new <= 1024 for prompt, new in many)


def test_ratios_are_those_of_the_cases() -> None:
    values = {
        "splitfuse": (4.0, 50.0),
        "static": (2.0, 100.0),
        "prefill_first": (0.0, 300.0),
        "no_chunk": (8.0, 25.0),
    }
    rows = []
    for policy, (effective, itl) in values.items():
        rows += [Row("policies", "a", policy, f"effective_{rate}", effective, "req/s") for rate in (2, 4, 6)]
        rows += [Row("policies", "a", policy, f"itl_p{percent}", itl, "ms") for percent in (95, 99)]
    told = {(row.impl, row.metric): row.value for row in policies.summary(rows)}
    assert told["over static", "effective_4 median"] == 2
    assert told["over no_chunk", "effective_4 best"] == 0.5
    assert told["over prefill_first", "effective_4 only here"] == 1
    assert told["over prefill_first", "itl_p95 median"] == 6


def test_the_quick_run_tells_every_policy(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = policies.main(json=tmp_path / "rows.json", quick=True)
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(rows)
    answered = {(row.case, row.impl): row.value for row in rows if row.metric == "answered"}
    assert answered == {(case.name, policy): case.requests for case in policies.QUICK for policy in policies.POLICIES}
    assert "effective_4" in capsys.readouterr().out


def test_a_case_ends_when_its_time_is_up() -> None:
    model = policies.GPT(policies.model_config(True)).eval()
    model.init_weights(0)
    engine = policies.engines(model, longest=128, target_ms=50.0)["static"]
    traces, seconds = policies.run(engine, policies.Case(20, 30, 4, 10_000), limit_s=0.3)
    assert seconds < 20
    assert 0 <= len(traces) < 10_000
    assert engine.core.pool.used == 0
