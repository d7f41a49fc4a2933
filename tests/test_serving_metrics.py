"""Numbers of hand-made traces, for which the answers are known."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.benchmarks.rows import Row
from coterie.benchmarks.serving_metrics import (
    Trace,
    measure,
    meets,
    moving_averages,
    parse_slo,
    percentile,
    reads_well,
)
from coterie.benchmarks.serving_plot import curves


def made(start: float, times: list[float], prompt: int = 512, **more) -> Trace:
    """A request whose tokens came one by one, `times` seconds after `start`."""
    chunks = tuple((start + at, 1) for at in times)
    return Trace(prompt, len(times), start, more.pop("sent", start), chunks, len(times), **more)


def test_percentiles_lie_between_the_nearest_ranks() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert percentile([7.0], 90) == 7.0
    assert math.isnan(percentile([], 50))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
def test_percentiles_agree_with_the_standard_library(values: list[float]) -> None:
    hundred = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (50, 90, 99):
        assert percentile(values, percent) == pytest.approx(hundred[percent - 1], abs=1e-6)


def test_latencies_of_one_request() -> None:
    trace = made(10.0, [0.5, 0.6, 0.8])
    assert (trace.ttft, trace.e2e) == (pytest.approx(0.5), pytest.approx(0.8))
    assert trace.tpot == pytest.approx(0.15)
    assert trace.gaps == [(pytest.approx(0.1), 1), (pytest.approx(0.2), 1)]


def test_latency_counts_from_when_the_request_was_due() -> None:
    assert made(10.0, [0.5], sent=10.4).ttft == pytest.approx(0.5)
    assert measure([made(10.0, [0.5], sent=10.4)], {})["late_p99"] == (pytest.approx(400.0), "ms")


def test_moving_average_by_hand() -> None:
    weight = 2 / 17
    assert moving_averages([(1.0, 1), (2.0, 1)]) == [1.0, pytest.approx(weight * 2 + (1 - weight))]
    # A chunk of two tokens after 2 s reads like two tokens after 1 s each.
    assert moving_averages([(2.0, 2)]) == [1.0, 1.0]


def test_every_point_of_the_average_must_be_under_the_bound() -> None:
    slow_start = made(0.0, [0.1, 0.9, *(0.9 + 0.01 * k for k in range(1, 200))])
    assert moving_averages(slow_start.gaps)[-1] < 0.02
    assert not reads_well(slow_start, 2)
    assert reads_well(slow_start, 1)
    # One gap of a second amid fast ones moves the average by 2 / 17 of it.
    steady = [0.1 + 0.01 * k for k in range(50)]
    hiccup = made(0.0, steady + [steady[-1] + 1.0 + 0.01 * k for k in range(50)])
    assert reads_well(hiccup, 6)


def test_first_token_is_bound_by_the_prompt() -> None:
    assert reads_well(made(0.0, [0.99, 1.0], prompt=512), 2)
    assert not reads_well(made(0.0, [1.01, 1.02], prompt=512), 2)
    assert not reads_well(made(0.0, [0.2, 0.21], prompt=100), 2)
    assert not reads_well(made(0.0, [0.2], prompt=512, error="cut stream"), 2)


def test_throughput_is_completed_over_wall_time_and_not_clients_over_latency() -> None:
    # Two clients; one request hangs for 100 s while the other client does ten of 1 s each.
    quick = [made(float(k), [0.5, 1.0]) for k in range(10)]
    found = measure([made(0.0, [50.0, 100.0]), *quick], {})
    assert found["wall"] == (100.0, "s")
    assert found["req_s"][0] == pytest.approx(11 / 100)
    assert found["out_tok_s"][0] == pytest.approx(22 / 100)
    mean = statistics.mean([100.0, *[1.0] * 10])
    assert 2 / mean == pytest.approx(0.2)  # what Little's law would make of it


def test_failures_are_counted_and_named_and_lower_goodput() -> None:
    traces = [made(0.0, [0.1, 0.2]), made(0.0, [0.1], error="cut stream"), Trace(5, 2, 0.0, 0.0, error="HTTP 503")]
    found = measure(traces, {"ttft": 1.0})
    assert found["ok"][0] == 1
    assert found["failed: cut stream"] == (1, "requests")
    assert found["failed: HTTP 503"] == (1, "requests")
    assert found["goodput"][0] == pytest.approx(1 / 3)
    assert found["effective_2"][0] == pytest.approx(1 / 3)
    assert found["out_tok_s"][0] == pytest.approx(2 / 0.2)
    assert found["effective_2_req_s"][0] == pytest.approx(1 / 0.2)


def test_nothing_completed_is_zero_throughput() -> None:
    found = measure([Trace(5, 2, 1.0, 1.0, error="timeout")], {})
    assert found["req_s"][0] == found["out_tok_s"][0] == found["goodput"][0] == 0
    assert "ttft_p50" not in found


def test_slo_bounds() -> None:
    bounds = parse_slo("ttft=1000,itl=100")
    assert bounds == {"ttft": 1.0, "itl": 0.1}
    assert meets(made(0.0, [0.9, 0.99]), bounds)
    assert not meets(made(0.0, [0.9, 1.01]), bounds)
    assert not meets(made(0.0, [1.1, 1.2]), bounds)
    assert meets(made(0.0, [1.1, 1.2]), {})
    assert not meets(made(0.0, [0.1, 3.0]), parse_slo("e2e=2000"))
    assert not meets(made(0.0, [0.1, 3.0]), parse_slo("tpot=2000"))
    for wrong in ("ttft", "ttft=soon", "speed=3", "itl=-1", "itl=nan"):
        with pytest.raises(ValueError, match="--slo"):
            parse_slo(wrong)


def test_curves_keep_measured_pairs_in_the_order_of_the_load() -> None:
    # More load, less throughput: sorted by itself, either axis would tell another story.
    seen = {32: (80.0, 900.0), 1: (50.0, 10.0), 8: (100.0, 700.0)}
    rows = []
    for clients, (speed, latency) in seen.items():
        for metric, value in (("out_tok_s", speed), ("ttft_p50", latency), ("ok", 4.0)):
            rows.append(Row("serve", f"closed c={clients}", "x", metric, value, ""))
    rows.append(Row("layer", "closed c=9", "x", "ttft_p50", 1.0, ""))
    assert curves(rows, "ttft_p50") == {
        ("x", "closed"): [(50.0, 10.0, "c=1"), (100.0, 700.0, "c=8"), (80.0, 900.0, "c=32")]
    }
