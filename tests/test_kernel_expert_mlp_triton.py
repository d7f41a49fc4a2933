"""The experts' Triton kernels against the reference in fp64: values, all gradients, every kind of empty row."""

import math
from typing import Any

import pytest
import torch
from helpers import assert_close_rms
from torch import Tensor

from coterie.kernels import expert_mlp_triton, expert_sums_triton
from coterie.kernels.backend import HAS_TRITON, forced
from coterie.kernels.expert_mlp import _backward, _forward, expert_mlp, expert_mlp_reference
from coterie.kernels.permute import Plan, plan_rows, plan_slots

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

# activation, weights, biases
KINDS = {
    "swiglu": ("swiglu", True, False),
    "gelu-bias": ("gelu", True, True),
    "swiglu-bias-ones": ("swiglu", False, True),
    "gelu-ones": ("gelu", False, False),
}


def _operands(tokens: int, experts: int, choices: int, dim: int, hidden: int, kind: str) -> dict[str, Tensor]:
    activation, weighted, biased = KINDS[kind]
    width = 2 * hidden if activation == "swiglu" else hidden
    made = {
        "x": torch.randn(tokens, dim),
        "w_in": torch.randn(experts, width, dim) / math.sqrt(dim),
        "w_out": torch.randn(experts, dim, hidden) / math.sqrt(hidden),
    }
    if weighted:
        made["weights_TK"] = torch.rand(tokens, choices)
    if biased:
        made |= {"b_in_EN": torch.randn(experts, width), "b_out_ED": torch.randn(experts, dim)}
    return made


def _ids(tokens: int, experts: int, choices: int) -> Tensor:
    return torch.rand(tokens, experts).argsort(1)[:, :choices]


def _dropless() -> Plan:
    ids_TK = _ids(29, 5, 3)
    ids_TK[ids_TK == 2] = 4  # expert 2 gets no rows; expert 4 may serve a token twice
    return plan_rows(ids_TK, 5)


def _dropped() -> Plan:
    # Rows after the last expert, a token with no expert at all, and experts 0 and 4 empty.
    ids_TK = torch.where(torch.rand(29, 3) < 0.3, -1, _ids(29, 3, 3) + 1)
    ids_TK[7] = -1
    return plan_rows(ids_TK, 5)


def _slots() -> Plan:
    # Every expert ends in empty rows, and expert 3 has nothing else.
    ids_TK = _ids(29, 5, 3)
    ids_TK[ids_TK == 3] = -1
    ids_TK[::3, 0] = -1
    return plan_slots(ids_TK, 5, 27)


def _holes() -> Plan:
    # Empty rows between used ones, as no planner makes them but the contract allows.
    plan = _slots()
    order_R = torch.cat([torch.arange(e * 27, (e + 1) * 27).flip(0) for e in range(5)])
    slot_TK = torch.where(plan.slot_TK < 0, -1, order_R.argsort()[plan.slot_TK.clamp(min=0)])
    return Plan(plan.source_R[order_R], slot_TK, plan.counts_E)


PLANS = {
    "dropless": _dropless,
    "dropped": _dropped,
    "slots": _slots,
    "holes": _holes,
    "one expert takes all": lambda: plan_rows(torch.full((29, 3), 1), 5),
    "one token": lambda: plan_rows(torch.tensor([[4, 0, 3]]), 5),
    "all dropped": lambda: plan_rows(torch.full((2, 3), -1), 5),
    "no tokens": lambda: plan_rows(torch.zeros(0, 3, dtype=torch.int64), 5),
}


def _run(run: Any, plan: Plan, operands: dict[str, Tensor], kind: str, dy_TD: Tensor) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in operands.items()}
    first = [leaves["x"], plan, leaves["w_in"], leaves["w_out"]]
    rest = {name: value for name, value in leaves.items() if name[:2] in ("we", "b_")}
    y_TD = run(*first, activation=KINDS[kind][0], **rest)
    y_TD.backward(dy_TD)
    return {"y": y_TD.detach()} | {"d" + name: value.grad for name, value in leaves.items() if value.grad is not None}


def _check(
    backend: str, plan: Plan, operands: dict[str, Tensor], kind: str, ratio: float = 1e-5
) -> dict[str, Tensor]:
    dy_TD = torch.randn_like(operands["x"])
    wide = {name: value.double() for name, value in operands.items()}
    expected = _run(expert_mlp_reference, plan, wide, kind, dy_TD.double())
    with forced(backend):
        actual = _run(expert_mlp, plan, operands, kind, dy_TD)
    assert actual.keys() == {"y"} | {"d" + name for name in operands}
    for name, value in actual.items():
        assert_close_rms(value, expected[name], ratio, name)
    return actual


@pytest.mark.parametrize("kind", ["swiglu", "gelu-bias"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(plan: str, kind: str, poisoned: None) -> None:
    made = PLANS[plan]()
    _check("interpret", made, _operands(made.slot_TK.shape[0], 5, 3, 21, 35, kind), kind)


@pytest.mark.parametrize("kind", ["swiglu-bias-ones", "gelu-ones"])
def test_other_kinds(kind: str, poisoned: None) -> None:
    _check("interpret", _dropped(), _operands(29, 5, 3, 16, 32, kind), kind)


def test_one_choice_of_one_expert(poisoned: None) -> None:
    plan = plan_rows(torch.zeros(19, 1, dtype=torch.int64), 1)
    _check("interpret", plan, _operands(19, 1, 1, 5, 3, "swiglu"), "swiglu")


@pytest.mark.parametrize("plan", ["dropped", "slots"])
def test_all_that_is_returned_is_written(plan: str, poisoned: None) -> None:
    made = PLANS[plan]()
    operands = _operands(29, 5, 3, 21, 35, "gelu-bias")
    x_TD, *rest = operands.values()
    y_TD, z_RN = expert_mlp_triton.forward(x_TD, *made, *rest, activation="gelu")
    assert torch.isfinite(z_RN).all()
    gradients = expert_mlp_triton.backward(torch.randn_like(y_TD), x_TD, z_RN, *made, *rest, activation="gelu")
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not z_RN[made.counts_E.sum() :].any()


def test_experts_without_tokens_have_zero_gradients() -> None:
    actual = _check("interpret", _dropped(), _operands(29, 5, 3, 9, 7, "gelu-bias"), "gelu-bias")
    for name in ("dw_in", "dw_out", "db_in_EN", "db_out_ED"):
        assert not actual[name][[0, 4]].any()
        assert actual[name][[1, 2, 3]].any()


def test_strided_gradient_and_weights() -> None:
    operands = _operands(29, 5, 3, 9, 7, "swiglu")
    operands["w_in"] = operands["w_in"].mT.contiguous().mT
    operands["weights_TK"] = operands["weights_TK"].t().contiguous().t()
    expected = _run(expert_mlp_reference, _dropless_fixed(), operands, "swiglu", torch.ones(1, 1).expand(29, 9))
    with forced("interpret"):
        actual = _run(expert_mlp, _dropless_fixed(), operands, "swiglu", torch.ones(1, 1).expand(29, 9))
    for name, value in actual.items():
        assert_close_rms(value, expected[name], 1e-5, name)


def _dropless_fixed() -> Plan:
    return plan_rows((torch.arange(29)[:, None] * 2 + torch.arange(3)) % 5, 5)


def test_the_operators_are_well_formed() -> None:
    operands = {name: value.requires_grad_() for name, value in _operands(29, 5, 3, 9, 7, "gelu-bias").items()}
    x_TD, *rest = operands.values()
    args = (x_TD, *_dropped(), *rest, "gelu")
    plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
    with forced("interpret"):
        torch.library.opcheck(_forward, args)
        z_RN = _forward(*plain)[1]
        torch.library.opcheck(_backward, (torch.randn(29, 9), plain[0], z_RN, *plain[1:]))


def test_half_precision_through_the_interpreter() -> None:
    operands = _operands(29, 5, 3, 21, 35, "swiglu")
    operands = {name: value if name == "weights_TK" else value.half() for name, value in operands.items()}
    _check("interpret", _slots(), operands, "swiglu", 2e-3)


def test_column_sums_of_rows_and_of_tokens() -> None:
    plan = _holes()
    values_TC, values_RC, weights_TK = torch.randn(29, 18), torch.randn(135, 18), torch.rand(29, 3)
    rows = expert_sums_triton.column_sums(
        values_RC, plan.source_R, plan.counts_E, torch.float32, choices=3, gather=False
    )
    tokens = expert_sums_triton.column_sums(
        values_TC, plan.source_R, plan.counts_E, torch.float32, choices=3, gather=True, weights_TK=weights_TK
    )
    for e in range(5):
        used = [r for r in range(e * 27, (e + 1) * 27) if plan.source_R[r] >= 0]
        source = plan.source_R[used]
        assert_close_rms(rows[e], values_RC[used].sum(0))
        assert_close_rms(tokens[e], (values_TC[source // 3] * weights_TK.flatten()[source][:, None]).sum(0))


def _on_cuda(plan: Plan, operands: dict[str, Tensor], dtype: torch.dtype) -> tuple[Plan, dict[str, Tensor]]:
    moved = {name: v.cuda() if name == "weights_TK" else v.cuda().to(dtype) for name, v in operands.items()}
    return Plan(*(t.cuda() for t in plan)), moved


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_on_cuda(plan: str, kind: str, dtype: torch.dtype, ratio: float, poisoned: None) -> None:
    made = PLANS[plan]()
    _check("triton", *_on_cuda(made, _operands(made.slot_TK.shape[0], 5, 3, 136, 200, kind), dtype), kind, ratio)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_many_tiles_on_cuda(kind: str, poisoned: None) -> None:
    plan = plan_rows(_ids(4000, 24, 4), 24)
    _check("triton", *_on_cuda(plan, _operands(4000, 24, 4, 520, 312, kind), torch.bfloat16), kind, 1e-2)


@pytest.mark.gpu
def test_no_sync_and_the_same_bits_on_cuda() -> None:
    plan, operands = _on_cuda(_dropped(), _operands(29, 5, 3, 96, 80, "gelu-bias"), torch.bfloat16)
    dy_TD = torch.randn_like(operands["x"])
    first = _run(expert_mlp, plan, operands, "gelu-bias", dy_TD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = _run(expert_mlp, plan, operands, "gelu-bias", dy_TD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_cuda() -> None:
    # 150,000 rows of z of 2^14, and 40 matrices of 2^26: the last rows and the last expert lie past 2^31.
    tokens, experts, dim, hidden = 150_000, 40, 4096, 8192
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    ids_TK = torch.zeros(tokens, 1, dtype=torch.int64, device="cuda")
    ids_TK[-150:] = experts - 1
    x_TD, dy_TD = torch.zeros(tokens, dim, **bf16), torch.zeros(tokens, dim, **bf16)
    x_TD[-150:], dy_TD[-150:] = torch.randn(150, dim, **bf16), torch.randn(150, dim, **bf16)
    w_in, w_out = torch.zeros(experts, 2 * hidden, dim, **bf16), torch.zeros(experts, dim, hidden, **bf16)
    w_in[-1], w_out[-1] = torch.randn(2 * hidden, dim, **bf16) / 64, torch.randn(dim, hidden, **bf16) / 90
    operands = {"x": x_TD, "w_in": w_in, "w_out": w_out, "weights_TK": torch.rand(tokens, 1, device="cuda")}
    actual = _run(expert_mlp, plan_rows(ids_TK, experts), operands, "swiglu", dy_TD)
    small = {"x": x_TD[-150:], "w_in": w_in[-1:], "w_out": w_out[-1:], "weights_TK": operands["weights_TK"][-150:]}
    small = {name: value.float() for name, value in small.items()}
    plan = plan_rows(torch.zeros(150, 1, dtype=torch.int64, device="cuda"), 1)
    expected = _run(expert_mlp_reference, plan, small, "swiglu", dy_TD[-150:].float())
    for name, value in expected.items():
        got = actual[name][-1:] if name in ("dw_in", "dw_out") else actual[name][-150:]
        assert_close_rms(got, value, 1e-2, name)
    assert not actual["y"][:-150].any()
