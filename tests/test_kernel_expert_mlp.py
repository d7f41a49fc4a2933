"""expert_mlp against its reference in fp64: values, all gradients, and the plans that can go wrong."""

import math
from typing import Any

import pytest
import torch
from helpers import assert_close_rms
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.kernels import cpu_gemm, expert_mlp_cpu
from coterie.kernels import expert_mlp as expert_mlp_op
from coterie.kernels.backend import forced
from coterie.kernels.expert_mlp import _backward, _forward, expert_mlp, expert_mlp_reference
from coterie.kernels.permute import Plan, plan_rows, plan_slots

NAMES = ("x", "w_in", "w_out", "weights_TK", "b_in_EN", "b_out_ED")
KINDS = ["swiglu", "gelu", "swiglu-bias", "gelu-bias", "swiglu-ones"]


def _operands(tokens: int, experts: int, choices: int, kind: str, dim: int = 20, hidden: int = 36) -> dict[str, Any]:
    activation = kind.split("-")[0]
    width = 2 * hidden if activation == "swiglu" else hidden
    made: dict[str, Any] = {
        "x": torch.randn(tokens, dim),
        "w_in": torch.randn(experts, width, dim) / math.sqrt(dim),
        "w_out": torch.randn(experts, dim, hidden) / math.sqrt(hidden),
        "weights_TK": None if kind.endswith("ones") else torch.rand(tokens, choices),
        "b_in_EN": torch.randn(experts, width) if kind.endswith("bias") else None,
        "b_out_ED": torch.randn(experts, dim) if kind.endswith("bias") else None,
    }
    return made


def _distinct(tokens: int, experts: int, choices: int) -> Tensor:
    return torch.rand(tokens, experts).argsort(1)[:, :choices]


def _run(run: Any, plan: Plan, operands: dict[str, Any], kind: str, dy_TD: Tensor) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in operands.items() if v is not None}
    options = {k: v for k, v in leaves.items() if k[0] in "wb" and k[:2] != "w_"}
    y_TD = run(leaves["x"], plan, leaves["w_in"], leaves["w_out"], activation=kind.split("-")[0], **options)
    y_TD.backward(dy_TD.to(y_TD.dtype))
    return {"y": y_TD.detach()} | {"d" + k: v.grad for k, v in leaves.items()}


def _check(plan: Plan, operands: dict[str, Any], kind: str, ratio: float = 1e-5) -> None:
    dy_TD = torch.randn_like(operands["x"])
    wide = {k: None if v is None else v.double() for k, v in operands.items()}
    expected = _run(expert_mlp_reference, plan, wide, kind, dy_TD)
    actual = _run(expert_mlp, plan, operands, kind, dy_TD)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close_rms(value, expected[name], ratio, name)


@pytest.fixture
def poisoned_buffers(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`poisoned`, and NaN in the large buffers too."""
    for module in (cpu_gemm, expert_mlp_cpu):
        monkeypatch.setattr(module, "empty", lambda shape, dtype: torch.full(shape, float("nan"), dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.usefixtures("poisoned_buffers")
def test_equals_the_reference(kind: str, choices: int) -> None:
    ids_TK = _distinct(53, 5, choices)
    ids_TK[ids_TK == 2] = 5  # expert 2 has no tokens
    _check(plan_rows(ids_TK, 7), _operands(53, 7, choices, kind), kind)


@pytest.mark.parametrize("kind", ["swiglu", "gelu-bias"])
@pytest.mark.usefixtures("poisoned_buffers")
def test_dropped_choices_and_empty_rows(kind: str) -> None:
    ids_TK = _distinct(41, 6, 2)
    ids_TK[torch.rand(41, 2) < 0.3] = -1
    ids_TK[7] = -1  # a token of which nothing is left
    operands = _operands(41, 6, 2, kind)
    _check(plan_rows(ids_TK, 6), operands, kind)
    _check(plan_slots(ids_TK, 6, int(plan_rows(ids_TK, 6).counts_E.max()) + 3), operands, kind)


@pytest.mark.parametrize("tokens", [1, 2, 700])
def test_all_tokens_to_one_expert(tokens: int) -> None:
    _check(plan_rows(torch.full((tokens, 1), 3), 4), _operands(tokens, 4, 1, "swiglu"), "swiglu")


def test_an_expert_chosen_twice_by_one_token() -> None:
    _check(plan_rows(torch.tensor([[1, 1], [0, 1], [2, 2]]), 3), _operands(3, 3, 2, "swiglu"), "swiglu")


@pytest.mark.parametrize("ids_TK", [torch.empty(0, 2, dtype=torch.int64), torch.full((6, 2), -1)])
def test_nothing_to_do(ids_TK: Tensor) -> None:
    operands = _operands(len(ids_TK), 3, 2, "swiglu-bias")
    actual = _run(expert_mlp, plan_rows(ids_TK, 3), operands, "swiglu-bias", torch.randn_like(operands["x"]))
    for name, value in actual.items():
        assert value.count_nonzero() == 0, name


def test_a_token_that_is_not_finite_stays_alone() -> None:
    operands = _operands(9, 3, 1, "swiglu")
    plan = plan_slots(torch.tensor([[0], [1], [2]]).repeat(3, 1), 3, 5)
    operands["x"][0] = float("nan")  # token 0, to which a careless gather sends every empty row
    actual = _run(expert_mlp, plan, operands, "swiglu", torch.ones_like(operands["x"]))
    assert torch.isfinite(actual["y"][1:]).all()
    assert torch.isfinite(actual["dw_in"][1:]).all()
    assert torch.isfinite(actual["dw_out"][1:]).all()


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_the_weight_of_a_dropped_choice_is_never_read(backend: str) -> None:
    ids_TK = torch.tensor([[-1, 0], [1, 2], [1, 0]])
    operands = _operands(3, 3, 2, "swiglu")
    operands["weights_TK"][0, 0] = float("nan")  # to which a careless gather sends every empty row
    with forced(backend):
        actual = _run(expert_mlp, plan_slots(ids_TK, 3, 5), operands, "swiglu", torch.ones(3, 20))
    for name, value in actual.items():
        assert torch.isfinite(value).all(), name


def test_doubles_stay_doubles() -> None:
    plan, operands = plan_rows(_distinct(9, 3, 2), 3), _operands(9, 3, 2, "swiglu-bias")
    _check(plan, {k: None if v is None else v.double() for k, v in operands.items()}, "swiglu-bias", 1e-12)


def test_another_default_dtype_changes_nothing() -> None:
    plan, operands, dy_TD = plan_rows(_distinct(9, 3, 2), 3), _operands(9, 3, 2, "swiglu-bias"), torch.randn(9, 20)
    expected = _run(expert_mlp, plan, operands, "swiglu-bias", dy_TD)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = _run(expert_mlp, plan, operands, "swiglu-bias", dy_TD)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_torch_on_cuda_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of the CPU writes into buffers of the CPU."""
    operands, plan = _operands(4, 3, 2, "swiglu"), plan_rows(_distinct(4, 3, 2), 3)
    monkeypatch.setattr(expert_mlp_op, "expert_mlp_reference", lambda *a, **k: "reference")
    with FakeTensorMode(), forced("torch"):
        moved = {k: torch.empty(v.shape, device="cuda") for k, v in operands.items() if v is not None}
        there = Plan(*(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in plan))
        assert expert_mlp(moved["x"], there, moved["w_in"], moved["w_out"]) == "reference"


def test_views_and_expanded_gradients() -> None:
    operands = _operands(31, 4, 2, "swiglu-bias")
    operands["x"] = torch.randn(20, 31).t()
    operands["w_in"] = operands["w_in"].transpose(1, 2).contiguous().transpose(1, 2)
    operands["weights_TK"] = torch.rand(2, 31).t()
    plan = plan_rows(_distinct(31, 4, 2), 4)
    leaves = {k: v.requires_grad_() for k, v in operands.items()}
    rest = {k: leaves[k] for k in NAMES[3:]}
    both = []
    for run in (expert_mlp, expert_mlp_reference):
        y_TD = run(leaves["x"], plan, leaves["w_in"], leaves["w_out"], **rest)
        both.append([y_TD, *torch.autograd.grad(y_TD.sum(), list(leaves.values()))])
    for name, actual, expected in zip(("y", *NAMES), *both, strict=True):
        assert_close_rms(actual, expected, 1e-5, name)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    operands = _operands(13, 3, 2, "swiglu")
    weights_TK = operands["weights_TK"].requires_grad_()
    plan = plan_rows(_distinct(13, 3, 2), 3)
    y_TD = expert_mlp(operands["x"], plan, operands["w_in"], operands["w_out"], weights_TK=weights_TK)
    (got,) = torch.autograd.grad(y_TD.sum(), weights_TK)
    y_TD = expert_mlp_reference(operands["x"], plan, operands["w_in"], operands["w_out"], weights_TK=weights_TK)
    assert_close_rms(got, torch.autograd.grad(y_TD.sum(), weights_TK)[0])


@pytest.mark.parametrize("kind", ["swiglu", "gelu-bias"])
def test_bf16_is_near_fp32(kind: str) -> None:
    operands = {
        k: v if v is None or k == "weights_TK" else v.bfloat16()
        for k, v in _operands(150, 4, 2, kind, dim=64, hidden=96).items()
    }
    _check(plan_rows(_distinct(150, 4, 2), 4), operands, kind, 1.2e-2)


def test_large_buffers_and_many_rows() -> None:
    assert cpu_gemm.empty((3, 1 << 20), torch.bfloat16).shape == (3, 1 << 20)
    assert cpu_gemm.empty((2, 1 << 20), torch.float32).data_ptr() % 64 == 0
    operands = _operands(2100, 3, 2, "swiglu", dim=32, hidden=260)
    _check(plan_rows(_distinct(2100, 3, 2), 3), operands, "swiglu")


def test_the_same_bits_twice() -> None:
    operands = _operands(64, 4, 3, "swiglu")
    plan, dy_TD = plan_rows(_distinct(64, 4, 3), 4), torch.randn(64, 20)
    first, second = (_run(expert_mlp, plan, operands, "swiglu", dy_TD) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@given(st.lists(st.integers(0, 5000), max_size=20))
def test_buckets_hold_the_rows_and_are_few(counts: list[int]) -> None:
    filled = [expert_mlp_cpu.bucket(count) for count in counts]
    assert all(count <= rows <= count + count // 16 for count, rows in zip(counts, filled, strict=True))
    assert sum(filled) <= expert_mlp_cpu.saved_rows(sum(counts))


def test_there_are_sixteen_buckets_between_two_powers_of_two() -> None:
    assert len({expert_mlp_cpu.bucket(rows) for rows in range(513, 1025)}) == 16


def test_saves_x_and_z_alone() -> None:
    operands = {k: None if v is None else v.requires_grad_() for k, v in _operands(10, 3, 2, "swiglu-bias").items()}
    saved: list[Tensor] = []
    plan = plan_rows(_distinct(10, 3, 2), 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        expert_mlp(operands["x"], plan, operands["w_in"], operands["w_out"], **{k: operands[k] for k in NAMES[3:]})
    given = {v.data_ptr() for v in (*operands.values(), *plan)}
    activations = [t for t in saved if t.data_ptr() not in given]
    assert [tuple(t.shape) for t in activations] == [(expert_mlp_cpu.saved_rows(20), 72)]


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    operands = _operands(11, 3, 2, kind)
    ids_TK = _distinct(11, 3, 2)
    ids_TK[4] = -1
    leaves = [None if v is None else v.requires_grad_() for v in operands.values()]
    args = (leaves[0], *plan_rows(ids_TK, 3), *leaves[1:], kind.split("-")[0])
    torch.library.opcheck(_forward, args)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
    z_RN = _forward(*plain)[1]
    torch.library.opcheck(_backward, (torch.randn(11, 20), plain[0], z_RN, *plain[1:]))


def test_compiles_without_a_break() -> None:
    operands, plan = _operands(8, 3, 2, "swiglu"), plan_rows(_distinct(8, 3, 2), 3)
    args = (operands["x"], plan, operands["w_in"], operands["w_out"])
    compiled = torch.compile(expert_mlp, backend="aot_eager", fullgraph=True)
    assert_close_rms(
        compiled(*args, weights_TK=operands["weights_TK"]),
        expert_mlp_reference(*args, weights_TK=operands["weights_TK"]),
    )


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_mlp_cpu, "forward", None)
    operands = _operands(8, 3, 2, "swiglu")
    plan = plan_rows(_distinct(8, 3, 2), 3)
    with forced("reference"):
        assert expert_mlp(operands["x"], plan, operands["w_in"], operands["w_out"]).shape == (8, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation 'relu' is not one of swiglu, gelu"),
        ({"activation": "gelu"}, r"w_in has shape \(3, 72, 20\); .* must be \(3, 36, 20\)"),
        ({"weights_TK": torch.rand(8, 3)}, r"weights has shape \(8, 3\)"),
        ({"b_out_ED": torch.rand(3, 21)}, r"b_out has shape \(3, 21\)"),
        ({"b_in_EN": torch.rand(3, 72, dtype=torch.float64)}, "b_in is torch.float64 and w_out is torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    operands = _operands(8, 3, 2, "swiglu")
    plan = plan_rows(_distinct(8, 3, 2), 3)
    with pytest.raises(ValueError, match=message):
        expert_mlp(operands["x"], plan, operands["w_in"], operands["w_out"], **change)


class _Zeros(TorchDispatchMode):
    """Shapes of the tensors that autograd fills with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in (
            torch.ops.aten.zeros.default,
            torch.ops.aten.new_zeros.default,
            torch.ops.aten.zeros_like.default,
        ):
            self.shapes.append(tuple(made.shape))
        return made


def test_the_saved_activation_gets_no_gradient() -> None:
    operands, plan = _operands(53, 5, 2, "swiglu"), plan_rows(_distinct(53, 5, 2), 5)
    z_shape = (len(plan.source_R), operands["w_in"].shape[1])
    x_TD = operands["x"].requires_grad_()
    y_TD = expert_mlp(x_TD, plan, operands["w_in"], operands["w_out"])
    with _Zeros() as zeros:
        y_TD.sum().backward()
    assert x_TD.grad is not None
    assert z_shape not in zeros.shapes
