"""The benchmark of policies: what it counts, and that it runs."""

import json

import pytest

from coterie.benchmarks import policies
from coterie.benchmarks.rows import Row
from coterie.benchmarks.serving_metrics import Trace, reads_well
from coterie.infer.blocks import BlockPool
from coterie.infer.budget import Point, StepTimes
from coterie.infer.request import Request, SamplingParams
from coterie.infer.scheduler import Scheduler
from coterie.infer.step import Budget, Policy, Result, SchedulerConfig


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
    engine = policies.engines(model, longest=128, target_ms=50.0, limit_ms=200.0)["static"]
    traces, seconds = policies.run(engine, policies.Case(20, 30, 4, 10_000), limit_s=0.3)
    assert seconds < 20
    assert 0 <= len(traces) < 10_000
    assert engine.core.pool.used == 0


def _simulated(policy: Policy, budget: int | Budget, case: policies.Case, times: StepTimes) -> dict[int, float]:
    """The share of the content in a closed loop on a machine whose steps take what `times` says."""
    scheduler = Scheduler(
        SchedulerConfig(policy=policy, budget=budget, max_sequences=64, max_positions=4096), BlockPool(20_000, 16)
    )
    waiting, now, traces = case.lengths(0, 4096)[::-1], 0.0, dict[str, tuple[int, int, float, list]]()
    live = 0
    while waiting or live:
        while waiting and live < case.clients:
            prompt, new = waiting.pop()
            params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
            tokens = tuple(range(len(traces), len(traces) + prompt))  # nobody shares a prefix
            request = Request(str(len(traces)), tokens, params, arrival=now)
            scheduler.add(request)
            traces[request.id] = (prompt, new, now, [])
            live += 1
        step = scheduler.schedule(now)
        wanted = [piece for piece in step.slices if piece.wants_logits]
        context = sum(piece.start for piece in wanted if len(piece.tokens) == 1)
        now += times.predict(step.tokens, len(wanted), context)
        for event in scheduler.commit(step, {piece.key: Result(5) for piece in wanted}):
            traces[event.key[0]][3].append((now, len(event.tokens)))
            live -= event.finish is not None
    done = [Trace(p, n, sent, sent, tuple(chunks), n, "") for p, n, sent, chunks in traces.values()]
    return {rate: sum(reads_well(trace, rate) for trace in done) / len(done) for rate in (2, 4, 6)}


# (tokens, milliseconds) of steps of the decode bench's model on two cores.
CPU = ((1, 7), (2, 9), (4, 12), (8, 17), (16, 22), (32, 27), (64, 31), (128, 42), (256, 65), (512, 115), (1024, 225))


@pytest.mark.parametrize("clients", [4, 16, 32])
def test_waiting_prompts_make_steps_larger(clients: int) -> None:
    """A small budget alone starves prompts where clients wait; told what readers bear, no other policy does better
    by more than noise."""
    times = StepTimes([Point(tokens, ms / 1e3, 0.0) for tokens, ms in CPU], 1e-4, 1e-6, 8192)
    for prompt in (300, 650):
        case = policies.Case(prompt, 20, clients, 3 * clients + 40)
        others: list[tuple[Policy, int]] = [("static", 768), ("prefill_first", 768), ("no_chunk", 768)]
        best = [_simulated(policy, budget, case, times) for policy, budget in others]
        calm = _simulated("splitfuse", times.budget(0.05), case, times)
        for rate in (2, 4):
            told = _simulated("splitfuse", times.budget(0.05, 0.8 / rate), case, times)
            assert told[rate] >= max(one[rate] for one in best) - 0.1, (prompt, rate)
            assert told[rate] >= calm[rate]
        if clients == 32:
            assert calm[2] < 0.1 < told[4]
