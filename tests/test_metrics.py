"""What /metrics tells: its counters and histograms against counts made by hand."""

import gc
import threading
import time
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from fake_engine import EXPERTS, LAYERS, FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from serving import client_of, complete

import coterie.serve.metrics as module
from coterie.infer.outputs import Delta, StepReport
from coterie.infer.request import QueueFull, SamplingParams
from coterie.serve.expert_metrics import ExpertMetrics, entropy
from coterie.serve.metrics import Metrics

REPORT = StepReport(
    1, 0.02, 10, 2, 1, 3, running=2, waiting=5, blocks_used=4, blocks=16, preempted=1, drafted=6, accepted=4,
    loads=((4, 0, 0, 0), (1, 1, 1, 1)), roofline=0.5,
)  # fmt: skip


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels but for model_name) -> value, as a scraper sees it."""
    body, kind = metrics.render()
    assert kind.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if not sample.name.startswith("process_"):
                assert labels.pop("model_name") == "fake", sample
            key = sample.name, tuple(sorted(labels.items()))
            assert key not in found, f"{key} is told twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: object) -> float:
    return read(metrics)[name, tuple(sorted((key, str(label)) for key, label in labels.items()))]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(FakeEngine())  # pyright: ignore[reportArgumentType]


def test_names_and_labels_are_those_that_dashboards_of_vllm_ask_for(metrics: Metrics) -> None:
    names = {name for name, _ in read(metrics)}
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total"),
        *("request_success_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"),
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_sum", "iteration_tokens_total_count"),
        *("e2e_request_latency_seconds_bucket", "request_time_per_output_token_seconds_count"),
        *("request_queue_time_seconds_sum", "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum"),
        *("request_prompt_tokens_bucket", "request_generation_tokens_bucket", "cache_config_info"),
    ):
        assert f"vllm:{name}" in names
    assert not [name for name in names if name.endswith("_created")]


def test_a_request_told_token_by_token_is_counted_by_hand(metrics: Metrics) -> None:
    metrics.begin("a", 7, now=100.0)
    metrics.delta("a", Delta(("a", 0), "x", (1,), cached=4, queued=0.125), 100.5)
    metrics.delta("a", Delta(("a", 0), "", ()), 100.55)  # text without tokens is no token
    metrics.delta("a", Delta(("a", 0), "y", (2, 3)), 100.75)
    metrics.delta("a", Delta(("a", 0), "z", (4,), finish="stop"), 101.75)
    metrics.end("a", "stop", now=102.0)
    found = read(metrics)
    expected = {
        "prompt_tokens_total": 7,
        "prompt_tokens_cached_total": 4,
        "generation_tokens_total": 4,
        "time_to_first_token_seconds_sum": 0.5,
        "time_to_first_token_seconds_count": 1,
        "request_queue_time_seconds_sum": 0.125,
        "request_prefill_time_seconds_sum": 0.375,
        "inter_token_latency_seconds_sum": 1.25,
        "inter_token_latency_seconds_count": 2,
        "request_time_per_output_token_seconds_sum": 1.25 / 3,
        "request_decode_time_seconds_sum": 1.25,
        "request_inference_time_seconds_sum": 1.625,
        "e2e_request_latency_seconds_sum": 2.0,
        "request_prompt_tokens_sum": 7,
        "request_generation_tokens_sum": 4,
    }
    assert {name: found[f"vllm:{name}", ()] for name in expected} == pytest.approx(expected)
    success = {dict(labels)["finished_reason"]: n for (name, labels), n in found.items() if "success" in name}
    assert success == {"stop": 1, "length": 0, "abort": 0, "deadline": 0, "error": 0}


def test_buckets_hold_what_is_not_longer(metrics: Metrics) -> None:
    metrics.begin("a", 1, now=0.0)
    metrics.delta("a", Delta(("a", 0), "x", (1,)), 0.04)
    found = read(metrics)
    name = "vllm:time_to_first_token_seconds_bucket"
    assert found[name, (("le", "0.02"),)] == 0
    assert found[name, (("le", "0.04"),)] == found[name, (("le", "+Inf"),)] == 1


def test_choices_of_one_request_have_clocks_of_their_own(metrics: Metrics) -> None:
    metrics.begin("a", 3, now=0.0)
    for now, index in ((1.0, 0), (1.5, 1), (2.0, 0), (4.5, 1)):
        metrics.delta("a", Delta(("a", index), "x", (1,)), now)
    metrics.end("a", "length", now=5.0)
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == 4.0
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 1
    assert value(metrics, "vllm:prompt_tokens_total") == 3
    assert value(metrics, "vllm:request_generation_tokens_sum") == 4
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1


def test_nothing_is_counted_after_the_end_nor_for_strangers(metrics: Metrics) -> None:
    metrics.delta("unknown", Delta(("unknown", 0), "x", (1,)), 1.0)
    metrics.end("unknown", "stop")
    metrics.begin("a", 3)
    metrics.end("a", "abort")
    metrics.delta("a", Delta(("a", 0), "x", (1,)), 2.0)
    metrics.end("a", "abort")
    assert value(metrics, "vllm:generation_tokens_total") == value(metrics, "vllm:prompt_tokens_total") == 0
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 0
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 1


def test_reasons_and_codes_from_nowhere_make_no_series(metrics: Metrics) -> None:
    before = set(read(metrics))
    for i in range(50):
        metrics.rejected(1000 + i)
        metrics.begin(str(i), 1)
        metrics.end(str(i), f"reason {i}")
    metrics.rejected(429)
    assert set(read(metrics)) == before
    assert value(metrics, "coterie:requests_rejected_total", code="other") == 50
    assert value(metrics, "coterie:requests_rejected_total", code=429) == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="error") == 50


def test_steps_are_counted_by_hand(metrics: Metrics) -> None:
    engine = metrics._engine
    engine.submit([1, 2], SamplingParams(), lambda delta: None)  # not idle: gauges show the last step
    for hook in engine._hooks:  # pyright: ignore[reportAttributeAccessIssue]
        hook(REPORT)
        hook(replace(REPORT, tokens=30, seconds=0.06, running=3, loads=((1, 1, 0, 0), (0, 0, 0, 8)), roofline=0.9))
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 5,
        "vllm:num_preemptions_total": 2,
        "vllm:iteration_tokens_total_sum": 40,
        "vllm:iteration_tokens_total_count": 2,
        "vllm:spec_decode_num_draft_tokens_total": 12,
        "vllm:spec_decode_num_accepted_tokens_total": 8,
        "coterie:step_seconds_sum": 0.08,
        "coterie:roofline_fraction": (0.5 * 0.02 + 0.9 * 0.06) / 0.08,
        "vllm:kv_cache_usage_perc": 4 / 1000,  # the engine's own count of blocks
    }
    found = read(metrics)
    assert {name: found[name, ()] for name in expected} == pytest.approx(expected)
    loads = {labels: n for (name, labels), n in found.items() if name == "coterie:expert_load_total"}
    by_hand = [[5, 1, 0, 0], [1, 1, 1, 9]]
    assert loads == {
        (("expert", str(e)), ("layer", str(layer))): n for layer, row in enumerate(by_hand) for e, n in enumerate(row)
    }
    for layer, row in enumerate(by_hand):
        assert found["coterie:expert_entropy", (("layer", str(layer)),)] == pytest.approx(entropy(row))
        assert found["coterie:expert_imbalance", (("layer", str(layer)),)] == max(row) * 4 / sum(row)
    distinct = [found["coterie:distinct_experts", (("layer", str(layer)),)] for layer in (0, 1)]
    assert distinct == [2, 1]
    assert found["coterie:distinct_experts_per_step_sum", (("layer", "0"),)] == 1 + 2
    assert found["coterie:distinct_experts_per_step_count", (("layer", "1"),)] == 2


def test_entropy_is_a_share_of_its_most() -> None:
    assert entropy([5, 5, 5, 5]) == pytest.approx(1)
    assert entropy([9, 0, 0, 0]) == 0
    assert entropy([1, 1, 0, 0]) == pytest.approx(0.5)
    assert entropy([0, 0]) is entropy([3]) is None


def test_a_model_with_too_many_experts_tells_a_sum_for_each_layer() -> None:
    experts = ExpertMetrics("m", most_series=7)
    experts.observe(REPORT, now=1.0)
    families = {family.name: family for family in experts.collect()}
    loads = [(sample.labels["expert"], sample.value) for sample in families["coterie:expert_load"].samples]
    assert loads == [("all", 4), ("all", 4)]
    many = ExpertMetrics("m", most_series=7)
    many.observe(replace(REPORT, loads=((1, 2),) * 100), now=1.0)
    assert max(len(family.samples) for family in many.collect()) <= 2 * 7  # a sum and a count


def test_the_spread_is_that_of_the_last_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = ExpertMetrics("m", window_s=60)

    def spread(now: float) -> list[float]:
        monkeypatch.setattr("time.monotonic", lambda: now)
        families = {family.name: family for family in experts.collect()}
        return [round(sample.value, 3) for sample in families["coterie:expert_entropy"].samples]

    one, even = replace(REPORT, loads=((8, 0),)), replace(REPORT, loads=((4, 4),))
    experts.observe(one, now=0.0)
    assert spread(1.0) == [0.0]
    for now in (60.0, 120.0, 180.0):
        experts.observe(even, now=now)
    assert spread(181.0) == [1.0]  # what was before is forgotten
    assert spread(1000.0) == []  # and so is all, where nothing came
    families = {family.name: family for family in experts.collect()}
    assert [sample.value for sample in families["coterie:expert_load"].samples] == [8 + 12, 12]  # the sums stay


def test_two_servers_in_one_process_do_not_disturb_each_other() -> None:
    one, two = Metrics(FakeEngine()), Metrics(FakeEngine())  # pyright: ignore[reportArgumentType]
    one.begin("a", 3)
    one.end("a", "stop")
    assert value(one, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(two, "vllm:request_success_total", finished_reason="stop") == 0


def test_an_engine_at_work_is_counted_as_its_clients_count() -> None:
    engine = FakeEngine()
    metrics = Metrics(engine)  # pyright: ignore[reportArgumentType]
    ended = threading.Semaphore(0)
    told = []

    def sink(delta: Delta) -> None:
        told.append(delta)
        metrics.delta(delta.key[0], delta, float(len(told)))
        if delta.finish:
            metrics.end(delta.key[0], delta.finish)
            ended.release()

    engine.start()
    for i in range(20):
        metrics.begin(f"r{i}", i + 1)
        while True:
            try:
                engine.submit([5] * (i + 1), SamplingParams(max_tokens=i % 7 + 1), sink, id=f"r{i}")
                break
            except QueueFull:
                pass
    assert all(ended.acquire(timeout=10) for _ in range(20))
    engine.stop()
    tokens = sum(i % 7 + 1 for i in range(20))
    assert sum(len(delta.tokens) for delta in told) == tokens
    assert value(metrics, "vllm:generation_tokens_total") == tokens
    assert value(metrics, "vllm:prompt_tokens_total") == sum(range(1, 21))
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 20
    assert value(metrics, "vllm:iteration_tokens_total_sum") == tokens
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            assert value(metrics, "coterie:expert_load_total", layer=layer, expert=expert) == tokens
    assert value(metrics, "vllm:num_requests_running") == value(metrics, "vllm:kv_cache_usage_perc") == 0


def test_records_of_dead_streams_do_not_grow(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RECORDS", 10)
    for i in range(100):
        metrics.begin(f"never ended {i}", 1)
    assert len(metrics._records) == 10

    def many() -> None:
        for i in range(500):
            metrics.begin(f"r{i}", 3)
            metrics.delta(f"r{i}", Delta((f"r{i}", 0), "x", (1,)), 1.0)
            metrics.end(f"r{i}", "abort" if i % 2 else "stop")
        metrics.render()

    many()
    tracemalloc.start()
    many()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(5):
        many()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000, f"{grown} bytes more after 2500 requests"


def test_scraping_while_steps_come_is_safe() -> None:
    engine = FakeEngine()
    metrics = Metrics(engine)  # pyright: ignore[reportArgumentType]
    failed = []

    def steps() -> None:
        try:
            for _ in range(300):
                engine._hooks[0](REPORT)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=steps) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        read(metrics)
    for thread in threads:
        thread.join()
    assert not failed
    assert value(metrics, "coterie:expert_load_total", layer=0, expert=0) == 900 * 4
    metrics.close()
    assert not engine._hooks


def test_a_scrape_waits_for_no_sink_that_waits_for_it() -> None:
    engine = FakeEngine()
    metrics = Metrics(engine)  # pyright: ignore[reportArgumentType]
    scrape = threading.Thread(target=metrics.render, daemon=True)

    def sink(delta: Delta) -> None:  # the fake engine holds its lock here
        scrape.start()
        scrape.join(0.2)
        metrics.delta(delta.key[0], delta, 1.0)

    metrics.begin("a", 1)
    engine.submit([1], SamplingParams(max_tokens=1), sink, id="a")
    step = threading.Thread(target=engine.step, daemon=True)
    step.start()
    step.join(5)
    scrape.join(5)
    assert not step.is_alive()
    assert not scrape.is_alive()


def test_a_request_that_is_answered_before_its_taking_is_known_is_counted() -> None:
    class Quick(FakeEngine):
        def submit(self, *arguments: Any, **named: Any) -> str:
            id = super().submit(*arguments, **named)
            time.sleep(0.2)  # meanwhile the engine's thread gives the whole answer
            return id

    engine = Quick()
    with client_of(engine) as client:
        assert complete(client, max_tokens=3).status_code == 200
        engine.refuse = QueueFull("full")
        assert complete(client, max_tokens=3).status_code == 429
        lines = client.get("/metrics").text.splitlines()
        found = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("vllm:")}
        reasons = [line for line in lines if line.startswith("vllm:request_success") and not line.endswith(" 0.0")]
        assert found["vllm:generation_tokens_total"] == 3
        assert found["vllm:time_to_first_token_seconds_count"] == 1
        assert len(reasons) == 1
        assert 'finished_reason="length"' in reasons[0]
        assert not client.app.state.service.metrics._records  # pyright: ignore
