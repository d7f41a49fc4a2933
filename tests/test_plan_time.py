"""Each part of the planner's time: what operators, copies, waiting and few numbers cost, and on which machine."""

from dataclasses import replace

import pytest
import torch
from plans import DENSE, H200, MODERN
from torch.profiler import ProfilerActivity, profile

from coterie.benchmarks import plan_probe
from coterie.benchmarks.plan import CASES, REFERENCE, Case, planned, waits
from coterie.benchmarks.plan_probe import machine_of, with_links
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.params import count_params, flops_per_token
from coterie.parallel.cost import Rate
from coterie.parallel.layout import Layout
from coterie.train.config import ParallelConfig
from coterie.train.machines import MACHINES, Links, Rings
from coterie.train.plan_memory import Run
from coterie.train.plan_time import PARAMETER, attention_flops, copied, operators
from coterie.train.plan_traffic import ring, span, tell

CPU = MACHINES["cpu"]
RUN = Run(128, 1, 1, 4, cpu=True)


def _counted(config: ModelConfig) -> int:
    """Operators of a forward and a backward pass that start no other, as torch's profiler sees them."""
    model = GPT(config)
    model.init_weights(0)
    ids = torch.randint(config.vocab_size, (1, 128))

    def run() -> None:
        out = model(ids, targets_BS=ids)
        (out.lm + out.aux).backward()

    run()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(e.name.startswith("aten::") and not e.cpu_children for e in seen.events())


@pytest.mark.parametrize("case", [c for c in CASES[:4] if c.parallel == ParallelConfig()], ids=lambda case: case.name)
def test_operators_are_as_many_as_the_profiler_counts(case: Case) -> None:
    """Within a quarter: experts with few rows are taken together."""
    planned_ = operators(case.model, Layout(), RUN)
    parameters = len(list(GPT(case.model, device="meta").parameters()))
    assert planned_ - PARAMETER * parameters == pytest.approx(_counted(case.model), rel=0.25)


def test_operators_grow_with_micro_batches_and_shrink_with_experts_elsewhere() -> None:
    one = operators(MODERN, Layout(), RUN)
    assert operators(MODERN, Layout(), RUN._replace(micros=4)) > 3 * one
    assert operators(MODERN, Layout(1, 4, ep=4), RUN) < operators(MODERN, Layout(1, 4), RUN)
    assert operators(DENSE, Layout(), RUN) < operators(DENSE, Layout(), RUN._replace(recompute="selective"))


def test_gloo_is_waited_for_and_nccl_hides() -> None:
    case = REFERENCE
    slow = planned(case, CPU).step
    assert slow.hidden == 0 < slow.fsdp
    assert slow.total == pytest.approx(sum(slow))
    fast = planned(case, replace(CPU, overlaps=True)).step
    assert fast.hidden == min(fast.compute, fast.fsdp)
    assert slow.total - fast.total == pytest.approx(fast.hidden)


def test_ranks_wait_for_each_other_and_one_rank_for_none() -> None:
    late = replace(CPU, waits=0.5)
    for case, waited in ((REFERENCE, 0.5), (CASES[0], 0.0)):
        step = planned(case, late).step
        assert step.waits == pytest.approx(waited * (step.compute + step.launch))


def test_more_cores_start_no_operator_faster() -> None:
    assert CPU.shared(1).launch == CPU.shared(2).launch == CPU.launch > 0
    assert CPU.shared(8).launch == 4 * CPU.launch
    assert H200.launch == H200.waits == 0


def test_both_types_have_their_own_fraction() -> None:
    on = replace(CPU, fraction=0.5, fraction_bf16=0.25)
    assert (on.rate(4), on.rate(2)) == (0.5 * on.fp32, 0.25 * on.bf16)
    assert H200.rate(2) == H200.fraction * H200.bf16


def test_fsdp_copies_in_numbers() -> None:
    """One rank in fp32 has no FSDP and adds up plainly; in bf16 it casts; more ranks read shards and write wholes."""
    total = count_params(DENSE).total
    assert copied(DENSE, Layout(), RUN) == 0
    assert copied(DENSE, Layout(), RUN._replace(micros=3)) == 2 * 12 * total
    kept = RUN._replace(reshard=False)
    assert copied(DENSE, Layout(), kept._replace(work=2)) == total * (4 + 2 + 4 + 2 + 4 + 8)
    two = copied(DENSE, Layout(1, 2), kept)
    assert two == pytest.approx(total * (8 / 2 + 8 + 8 + 8 / 2), rel=0.01)
    assert copied(DENSE, Layout(1, 2), kept._replace(micros=2)) == pytest.approx(
        total * (2 * (4 + 8) + 8 + 4 + 12), rel=0.01
    )


def test_selective_recompute_repeats_the_attention_alone() -> None:
    narrow = replace(DENSE, vocab_size=1, hidden=1)
    whole = flops_per_token(narrow, 64)
    assert attention_flops(narrow, 64) == pytest.approx(whole / 3, rel=0.1)
    none, selective, full = (
        planned(REFERENCE._replace(parallel=ParallelConfig(recompute=kind)), CPU).step.compute
        for kind in ("none", "selective", "full")
    )
    assert none < selective < full == pytest.approx(4 / 3 * none)


def test_few_numbers_go_by_a_tree_and_gloos_around() -> None:
    where = span(512, 512, 1, 8)
    assert tell(where, 8, H200).seconds < ring(where, 8 / 512, H200.ring("total"), rounds=2).seconds / 10
    links = Links(CPU.intra, CPU.inter)
    gloo = replace(CPU, rings=Rings(links, links, links))
    here = span(8, 8, 1, 8)
    assert tell(here, 8, gloo).seconds == pytest.approx(CPU.intra.latency + 14 * CPU.intra.message, rel=1e-3)
    assert tell(span(1, 1, 1, 1), 8, H200).seconds == 0


def test_a_ring_takes_the_links_of_its_kind() -> None:
    slow = Links(Rate(1.0, 1e9), Rate(1.0, 1e9))
    on = replace(CPU, rings=Rings(Links(CPU.intra, CPU.inter), slow, slow))
    moved = planned(REFERENCE, on).traffic
    usual = planned(REFERENCE, CPU).traffic
    assert moved.gather == usual.gather
    assert moved.reduce.seconds > moved.reduce.calls
    assert on.shared(8).ring("scatter").intra.latency == 4.0


def test_a_line_of_passes_gives_a_rate_and_what_operators_cost() -> None:
    one = flops_per_token(plan_probe.DENSE, plan_probe.SEQUENCE) * plan_probe.SEQUENCE
    begin = 0.010
    seconds = [begin + n * one / rate for rate in (1e11, 2e11) for n in (plan_probe.FEW, plan_probe.MANY)]
    on = machine_of([2e11, 8e11, 2e10, *seconds], 2)
    assert (on.rate(4), on.rate(2)) == (pytest.approx(1e11), pytest.approx(2e11))
    counted = plan_probe.ENDS + plan_probe.DENSE.layers * plan_probe.BLOCK
    assert on.launch * counted == pytest.approx(begin)


def test_the_reference_is_predicted_as_it_ran() -> None:
    """Its own time tells how long ranks wait; it cannot be less than nothing."""
    on = CPU.shared(2)
    assert planned(REFERENCE, replace(on, waits=waits(on, 5.0))).step.total == pytest.approx(5.0)
    assert waits(on, 1e-6) == 0


def test_links_of_one_node_stand_for_all() -> None:
    near, none = [1e-4, 1e9, 0.0], [0.0, float("inf"), 0.0]
    on = with_links(CPU, [[near, none]] * 4)
    assert on.inter == on.intra == on.ring("total").inter == Rate(*near)
    far = [1e-3, 1e8, 0.0]
    assert with_links(CPU, [[near, far]] * 4).ring("gather").inter == Rate(*far)
