"""Packed experts against the reference in fp64, and when a pack is no longer used."""

import copy
import math

import pytest
import torch
from helpers import assert_close_rms
from torch import Tensor

from coterie.kernels.backend import forced
from coterie.kernels.expert_mlp import expert_mlp_reference
from coterie.kernels.expert_mlp_packed import PackedExperts, can_pack
from coterie.kernels.permute import Plan, plan_rows, plan_slots
from coterie.moe.experts import Experts

RATIO = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
E, D, F = 5, 20, 36

pytestmark = pytest.mark.skipif(not can_pack(torch.ones(1)), reason="this torch has no packed products")


def _experts(activation: str = "swiglu", bias: bool = False, dtype: torch.dtype = torch.float32) -> Experts:
    experts = Experts(D, F, E, activation=activation, bias=bias)
    if experts.b_in is not None and experts.b_out is not None:
        torch.nn.init.normal_(experts.b_in)
        torch.nn.init.normal_(experts.b_out)
    return experts.to(dtype)


def _ids(tokens: int, choices: int = 2) -> Tensor:
    """Distinct experts of every token, of which the last expert has none."""
    return torch.rand(tokens, E - 1).argsort(1)[:, :choices]


def _expected(experts: Experts, x_TD: Tensor, plan: Plan, weights_TK: Tensor | None) -> Tensor:
    b_in = None if experts.b_in is None else experts.b_in.double().flatten(1)
    b_out = None if experts.b_out is None else experts.b_out.double()
    return expert_mlp_reference(
        x_TD.double(),
        plan,
        experts.w_in.double().flatten(1, 2),
        experts.w_out.double(),
        weights_TK=weights_TK,
        b_in_EN=b_in,
        b_out_ED=b_out,
        activation=experts.activation,
    ).detach()


@pytest.mark.parametrize("dtype", list(RATIO))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("tokens", [1, 53, 700])
def test_equals_the_reference(activation: str, bias: bool, dtype: torch.dtype, tokens: int) -> None:
    experts = _experts(activation, bias, dtype)
    experts.pack()
    assert experts.packed is not None
    x_TD, plan, weights_TK = torch.randn(tokens, D, dtype=dtype), plan_rows(_ids(tokens), E), torch.rand(tokens, 2)
    with torch.no_grad():
        y_TD = experts(x_TD, plan, weights_TK)
    assert experts.packed is not None
    assert_close_rms(y_TD, _expected(experts, x_TD, plan, weights_TK), RATIO[dtype], "y")


@pytest.mark.usefixtures("poisoned")
def test_dropped_choices_empty_rows_and_no_tokens() -> None:
    experts = _experts()
    experts.pack()
    x_TD, ids_TK = torch.randn(41, D), _ids(41)
    ids_TK[torch.rand(41, 2) < 0.3] = -1
    ids_TK[7] = -1
    with torch.inference_mode():
        for plan in (plan_rows(ids_TK, E), plan_slots(ids_TK, E, 41)):
            assert_close_rms(experts(x_TD, plan), _expected(experts, x_TD, plan, None), 1e-5, "y")
        assert experts(x_TD[:0], plan_rows(ids_TK[:0], E)).shape == (0, D)


def test_gradients_go_through_the_weights_themselves() -> None:
    experts = _experts()
    experts.pack()
    experts(torch.randn(9, D), plan_rows(_ids(9), E)).sum().backward()
    assert experts.w_in.grad is not None
    assert experts.w_in.grad.abs().sum() > 0


def _halve(experts: Experts) -> None:
    with torch.no_grad():
        experts.w_in *= 0.5


def _swap(experts: Experts) -> None:
    experts.w_out.data = experts.w_out.data * 0.5


@pytest.mark.parametrize("change", [_halve, _swap])
def test_a_pack_of_other_weights_is_dropped(change) -> None:
    experts = _experts()
    experts.pack()
    change(experts)
    x_TD, plan = torch.randn(9, D), plan_rows(_ids(9), E)
    with torch.no_grad():
        y_TD = experts(x_TD, plan)
    assert experts.packed is None
    assert_close_rms(y_TD, _expected(experts, x_TD, plan, None), 1e-5, "y")


def test_training_drops_the_pack() -> None:
    """Optimizers may write through `.data`, which counts no versions."""
    experts = _experts()
    experts.pack()
    experts.eval()
    assert experts.packed is not None
    experts.train()
    experts.w_in.data *= 0.5
    x_TD, plan = torch.randn(9, D), plan_rows(_ids(9), E)
    with torch.no_grad():
        assert_close_rms(experts.eval()(x_TD, plan), _expected(experts, x_TD, plan, None), 1e-5, "y")


def test_a_copy_has_no_pack() -> None:
    experts = _experts()
    experts.pack()
    twin = copy.deepcopy(experts)
    assert twin.packed is None
    assert experts.packed is not None
    assert torch.equal(twin.w_in, experts.w_in)


def test_the_reference_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    with forced("reference"):
        experts = _experts()
        experts.pack()
    assert experts.packed is None
    experts.pack()
    monkeypatch.setattr(PackedExperts, "__call__", None)
    with forced("reference"), torch.no_grad():
        assert experts(torch.randn(9, D), plan_rows(_ids(9), E)).shape == (9, D)


def test_refuses_what_the_weights_themselves_refuse() -> None:
    experts, plan = _experts(), plan_rows(_ids(9), E)
    experts.pack()
    with torch.no_grad():
        for x_TD in (torch.randn(9, D, dtype=torch.bfloat16), torch.randn(11, D), torch.randn(9, D + 1)):
            with pytest.raises(ValueError, match=r"expert_mlp: (x|w_in) "):
                experts(x_TD, plan)


def test_packed_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        w_in, w_out = torch.randn(E, 2 * F, D) / math.sqrt(D), torch.randn(E, D, F) / math.sqrt(F)
        packed = PackedExperts(w_in, w_out, "swiglu")
        assert packed.fresh(w_in, w_out)
        assert not packed.fresh(w_in, w_out.clone())
