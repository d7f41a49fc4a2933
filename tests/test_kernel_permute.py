"""The row plans and the two moves: plans against loops, moves against the reference, values and gradients."""

import pytest
import torch
from helpers import assert_close_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.kernels.backend import forced
from coterie.kernels.permute import (
    Plan,
    _permute,
    _plan,
    _unpermute,
    _unpermute_backward,
    permute,
    plan_rows,
    plan_slots,
    unpermute,
)

BACKENDS = ["torch", "interpret", pytest.param("triton", marks=pytest.mark.gpu)]
# tokens, choices, experts, capacity, width, share of dropped choices
CASES = {
    "even": (70, 3, 12, 20, 37, 0.0),
    "drops": (33, 4, 9, 7, 48, 0.3),
    "empty experts": (3, 2, 16, 2, 5, 0.1),
    "one token": (1, 2, 3, 1, 7, 0.0),
    "top 1": (45, 1, 4, 6, 130, 0.2),
    "one expert": (11, 1, 1, 11, 3, 0.0),
    "wide": (5, 2, 4, 3, 1500, 0.2),
    "all dropped": (4, 2, 3, 2, 6, 1.0),
    "several blocks": (150, 2, 5, 80, 4, 0.1),
    "no token": (0, 2, 3, 4, 5, 0.0),
    "no capacity": (4, 2, 3, 0, 5, 0.0),
}


def choices(tokens: int, top_k: int, experts: int, dropped: float) -> Tensor:
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    return ids.masked_fill(torch.rand(tokens, top_k) < dropped, -1)


def plan_in_python(ids: list[list[int]], experts: int, capacity: int | None) -> tuple[list, list, list]:
    flat = [e for row in ids for e in row]
    own = [[a for a, e in enumerate(flat) if e == expert][:capacity] for expert in range(experts)]
    counts = [len(o) if capacity is None else capacity for o in own]
    source = [a for o, count in zip(own, counts, strict=True) for a in o + [-1] * (count - len(o))]
    if capacity is None:
        source += [-1] * (len(flat) - len(source))
    slot = [source.index(a) if a in source else -1 for a in range(len(flat))]
    return source, slot, counts


def check_plan(plan: Plan, ids: Tensor, experts: int, capacity: int | None) -> None:
    source, slot, counts = plan_in_python(ids.tolist(), experts, capacity)
    assert plan.source_R.tolist() == source
    assert plan.slot_TK.flatten().tolist() == slot
    assert plan.slot_TK.shape == ids.shape
    assert plan.counts_E.tolist() == counts
    assert {t.dtype for t in plan} == {torch.int64}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cpu_plans_equal_a_loop(data: st.DataObject) -> None:
    tokens, top_k, experts = (data.draw(st.integers(low, high)) for low, high in ((0, 12), (1, 4), (1, 9)))
    expert = st.integers(-1, experts - 1)
    flat = data.draw(st.lists(expert, min_size=tokens * top_k, max_size=tokens * top_k))
    ids = torch.tensor(flat, dtype=torch.int64).view(tokens, top_k)
    capacity = data.draw(st.integers(0, 6))
    for backend in ("reference", "torch"):
        with forced(backend):
            check_plan(plan_rows(ids, experts), ids, experts, None)
            check_plan(plan_slots(ids, experts, capacity), ids, experts, capacity)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("case", CASES)
def test_triton_plans_equal_a_loop(case: str, backend: str) -> None:
    tokens, top_k, experts, capacity, _, dropped = CASES[case]
    ids = choices(tokens, top_k, experts, dropped).to("cuda" if backend == "triton" else "cpu")
    with forced(backend):
        check_plan(plan_rows(ids, experts), ids, experts, None)
        check_plan(plan_slots(ids, experts, capacity), ids, experts, capacity)


@pytest.mark.parametrize("experts", [254, 255, 256, 300, 65535, 65536])
def test_the_narrow_sort_keeps_empty_rows_last(experts: int) -> None:
    ids = torch.tensor([[experts - 1, -1], [0, experts - 1], [-1, experts - 2]])
    plan = plan_rows(ids, experts)
    assert plan.source_R.tolist() == [2, 5, 0, 3, -1, -1]
    assert plan.slot_TK.tolist() == [[2, -1], [0, 3], [-1, 1]]
    assert plan.counts_E.nonzero().flatten().tolist() == [0, experts - 2, experts - 1]
    assert plan.counts_E.sum() == 4


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_all_tokens_to_one_expert(backend: str) -> None:
    ids = torch.full((300, 1), 2)
    with forced(backend):
        plan = plan_rows(ids, 4)
        assert plan.source_R.tolist() == list(range(300))
        assert plan.counts_E.tolist() == [0, 0, 300, 0]
        full = plan_slots(ids, 4, 130)
    assert full.source_R[260:390].tolist() == list(range(130))
    assert (full.slot_TK[130:] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_an_id_past_the_experts_gets_no_row(backend: str) -> None:
    ids = torch.tensor([[3, 0], [2, 7]], device="cuda" if backend == "triton" else "cpu")
    with forced(backend):
        for plan in (plan_rows(ids, 3), plan_slots(ids, 3, 1)):
            assert plan.slot_TK[0, 0].item() == plan.slot_TK[1, 1].item() == -1
            assert sorted(plan.source_R[plan.source_R >= 0].tolist()) == [1, 2]


def moved(backend: str, plan: Plan, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both moves on seeded operands, with and without weights, and all their gradients."""
    (tokens, top_k), rows, device = plan.slot_TK.shape, plan.source_R.shape[0], plan.slot_TK.device
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, y = normal(tokens, width).to(dtype).requires_grad_(), normal(rows, width).to(dtype).requires_grad_()
    w = normal(tokens, top_k).requires_grad_()
    with forced(backend):
        out = {"x_RD": permute(x, plan), "y_TD": unpermute(y, plan, w), "sum_TD": unpermute(y, plan)}
        loss = sum(((o.float() * normal(*o.shape)).sum() for o in out.values()), torch.zeros((), device=device))
        loss.backward()
    return {**out, "dx": x.grad, "dy": y.grad, "dw": w.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["rows", "slots"])
@pytest.mark.parametrize("case", CASES)
def test_moves_equal_the_reference(case: str, layout: str, backend: str, poisoned: None) -> None:
    tokens, top_k, experts, capacity, width, dropped = CASES[case]
    ids = choices(tokens, top_k, experts, dropped).to("cuda" if backend == "triton" else "cpu")
    with forced("reference"):
        plan = plan_rows(ids, experts) if layout == "rows" else plan_slots(ids, experts, capacity)
    expected = moved("reference", plan, width, torch.float32)
    actual = moved(backend, plan, width, torch.float32)
    for name, tensor in expected.items():
        assert_close_rms(actual[name], tensor, 1e-6, name)
    assert torch.equal(actual["x_RD"], expected["x_RD"])
    assert not actual["x_RD"][plan.source_R < 0].any()
    assert not actual["dy"][plan.source_R < 0].any()
    assert not actual["dw"][plan.slot_TK < 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_moves(backend: str) -> None:
    ids = choices(21, 4, 6, 0.2).to("cuda" if backend == "triton" else "cpu")
    with forced("reference"):
        plan = plan_rows(ids, 6)
    expected = moved("reference", plan, 33, torch.float16)
    actual = moved(backend, plan, 33, torch.float16)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert_close_rms(actual[name].float(), tensor.float(), 1e-3, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_low_precision_rows_are_summed_in_fp32(backend: str, dtype: torch.dtype) -> None:
    """2048 + 1 + 1 - 2048 is 2 in fp32, and 0 in a sum that rounds to half precision on the way."""
    ids = torch.tensor([[0, 1, 2, 3]], device="cuda" if backend == "triton" else "cpu")
    y = torch.tensor([[2048.0], [1.0], [1.0], [-2048.0]], dtype=dtype, device=ids.device)
    with forced(backend):
        plan = plan_rows(ids, 4)
        x = torch.zeros(1, 1, dtype=dtype, device=ids.device, requires_grad=True)
        permute(x, plan).backward(y)
        sums = unpermute(y, plan), unpermute(y, plan, torch.ones(1, 4, device=ids.device)), x.grad
    # The reference's gradient is autograd's own, which rounds.
    for total in sums[:2] if backend == "reference" else sums:
        assert total is not None
        assert total.item() == 2.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_dropped_is_never_read(backend: str) -> None:
    """NaN in an empty row, or as the weight of a dropped choice, reaches nothing."""
    ids = torch.tensor([[-1, 0], [1, 2], [1, -1]], device="cuda" if backend == "triton" else "cpu")
    with forced(backend):
        plan = plan_slots(ids, 3, 2)
        empty = (plan.source_R < 0)[:, None]
        y = torch.randn(6, 5, device=ids.device).masked_fill(empty, float("nan")).requires_grad_()
        w = torch.randn(3, 2, device=ids.device).masked_fill(ids < 0, float("nan")).requires_grad_()
        out = unpermute(y, plan, w)
        out.square().sum().backward()
    assert y.grad is not None
    assert w.grad is not None
    assert out.isfinite().all()
    assert y.grad.isfinite().all()
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands_and_gradients(backend: str) -> None:
    ids = choices(10, 2, 4, 0.1).to("cuda" if backend == "triton" else "cpu")
    with forced("reference"):
        plan = plan_rows(ids, 4)
    results = []
    for name in ("reference", backend):
        torch.manual_seed(3)
        x = torch.randn(6, 10).to(ids.device).t().requires_grad_()
        w = torch.rand(2, 10).to(ids.device).t().requires_grad_()
        with forced(name):
            rows = permute(x, plan)
            y = unpermute(rows.flip(1), plan, w)
            y.sum(1, keepdim=True).expand(10, 6).sum().backward()
        results.append((rows, y, x.grad, w.grad))
    for expected, actual in zip(*results, strict=True):
        assert_close_rms(actual, expected, 1e-6)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    ids = choices(700, 4, 32, 0.1).cuda()
    x, w = torch.randn(700, 64, device="cuda", requires_grad=True), torch.rand(700, 4, device="cuda")
    w.requires_grad_()

    def whole_way() -> None:
        for plan in (plan_rows(ids, 32), plan_slots(ids, 32, 100)):
            unpermute(permute(x, plan), plan, w).sum().backward()

    whole_way()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole_way()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize("layout", ["rows", "slots"])
def test_the_operators_are_well_formed(layout: str, backend: str) -> None:
    ids = choices(7, 3, 5, 0.2)
    plan = plan_rows(ids, 5) if layout == "rows" else plan_slots(ids, 5, 4)
    x = torch.randn(7, 6, requires_grad=True)
    y = torch.randn(len(plan.source_R), 6, requires_grad=True)
    w = torch.rand(7, 3, requires_grad=True)
    where = (plan.source_R, plan.slot_TK)
    with forced(backend):
        torch.library.opcheck(_plan, (ids, 5, -1 if layout == "rows" else 4))
        torch.library.opcheck(_permute, (x, *where))
        torch.library.opcheck(_unpermute, (y, *where, w))
        torch.library.opcheck(_unpermute, (y, *where, None))
        torch.library.opcheck(_unpermute_backward, (x.detach(), y.detach(), *where, w.detach()))


def test_what_does_not_fit_is_refused() -> None:
    plan = plan_rows(torch.tensor([[0, 1], [2, -1]]), 3)
    with pytest.raises(ValueError, match="2 tokens"):
        permute(torch.zeros(3, 4), plan)
    with pytest.raises(ValueError, match="4 rows"):
        unpermute(torch.zeros(3, 4), plan)
    with pytest.raises(ValueError, match="weights of shape"):
        unpermute(torch.zeros(4, 4), plan, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="do not fit 3 experts"):
        plan_rows(torch.tensor([[3]]), 3)
    with pytest.raises(ValueError, match="do not fit 3 experts"):
        plan_slots(torch.tensor([[-2]]), 3, 1)
    with pytest.raises(ValueError, match="capacity -1"):
        plan_slots(torch.tensor([[0]]), 3, -1)
