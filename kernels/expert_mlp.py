"""The experts of a MoE layer as one operation: gather, up projection, activation, down projection, weighted sum.

Shapes: T tokens, D model, E experts, K choices, R routed rows, F expert hidden, N = 2F (swiglu) or F (gelu).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import expert_mlp_cpu
from .backend import choose
from .permute import Plan

ACTIVATIONS = ("swiglu", "gelu")


def expert_mlp(
    x_TD: Tensor,
    plan: Plan,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    *,
    weights_TK: Tensor | None = None,
    b_in_EN: Tensor | None = None,
    b_out_ED: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """y_t = sum_k w_tk * (w_out[e] a_tk + b_out[e]), a_tk = act(w_in[e] x_t + b_in[e]), e the k-th expert of token t.

    swiglu: act(z) = silu(z[:F]) * z[F:]; gelu: the tanh form, as in GPT-2. Weights are laid out as nn.Linear's:
    w_in (E, N, D), rows of the gate before those of the up projection, and w_out (E, D, F). `weights_TK` of None
    means ones. x, weights and biases share one dtype, which is y's; products accumulate in fp32.

    The backward pass keeps x and the pre-activation z_RN alone: the activation is computed again, and the gradient
    of a combine weight is <w_out^T dy_t, a_tk> + <dy_t, b_out>, so expert outputs are never stored (SonicMoE,
    arXiv 2512.14080). Sums run in a fixed order, so the result is deterministic. Differentiable once.

    Raises:
        ValueError: an activation or a shape does not fit.
    """
    check(x_TD, plan, w_in_END, w_out_EDF, weights_TK, b_in_EN, b_out_ED, activation)
    backend = choose(x_TD, w_in_END)
    if backend == "reference" or (backend == "torch" and x_TD.is_cuda):  # torch's own way is a CPU's
        return expert_mlp_reference(
            x_TD,
            plan,
            w_in_END,
            w_out_EDF,
            weights_TK=weights_TK,
            b_in_EN=b_in_EN,
            b_out_ED=b_out_ED,
            activation=activation,
        )
    return _forward(x_TD, *plan, w_in_END, w_out_EDF, weights_TK, b_in_EN, b_out_ED, activation)[0]


def expert_mlp_reference(
    x_TD: Tensor,
    plan: Plan,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    *,
    weights_TK: Tensor | None = None,
    b_in_EN: Tensor | None = None,
    b_out_ED: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """`expert_mlp` as a readable loop over the experts, differentiated by autograd; fp64 stays fp64."""
    choices = plan.slot_TK.shape[1]
    y_RD = x_TD.new_zeros(plan.source_R.shape[0], x_TD.shape[1])
    first = 0
    for e, count in enumerate(plan.counts_E.tolist()):
        rows = torch.arange(first, first + count, device=x_TD.device)
        rows = rows[plan.source_R[rows] >= 0]
        first += count
        z_RN = x_TD[plan.source_R[rows] // choices] @ w_in_END[e].t()
        z_RN = z_RN if b_in_EN is None else z_RN + b_in_EN[e]
        if activation == "swiglu":
            gate_RF, up_RF = z_RN.chunk(2, -1)
            a_RF = F.silu(gate_RF) * up_RF
        else:
            a_RF = F.gelu(z_RN, approximate="tanh")
        out_RD = a_RF @ w_out_EDF[e].t()
        y_RD = y_RD.index_copy(0, rows, out_RD if b_out_ED is None else out_RD + b_out_ED[e])
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TKD = y_RD[plan.slot_TK.clamp(min=0)].to(wide).masked_fill(plan.slot_TK[..., None] < 0, 0)
    if weights_TK is not None:
        y_TKD = y_TKD * weights_TK[..., None].to(wide)
    return y_TKD.sum(1).to(x_TD.dtype)


def check(
    x_TD: Tensor,
    plan: Plan,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor | None,
    b_in_EN: Tensor | None,
    b_out_ED: Tensor | None,
    activation: str,
) -> None:
    """Raises ValueError when these are no operands of `expert_mlp`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    experts, dim, hidden = w_out_EDF.shape
    width = 2 * hidden if activation == "swiglu" else hidden
    expected = {
        "x": (x_TD, (plan.slot_TK.shape[0], dim)),
        "w_in": (w_in_END, (experts, width, dim)),
        "counts": (plan.counts_E, (experts,)),
        "weights": (weights_TK, tuple(plan.slot_TK.shape)),
        "b_in": (b_in_EN, (experts, width)),
        "b_out": (b_out_ED, (experts, dim)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            fits = f"with w_out {tuple(w_out_EDF.shape)} and activation {activation} it must be {shape}"
            raise ValueError(f"expert_mlp: {name} has shape {tuple(tensor.shape)}; {fits}")
        if tensor is not None and name not in ("counts", "weights") and tensor.dtype != w_out_EDF.dtype:
            raise ValueError(
                f"expert_mlp: {name} is {tensor.dtype} and w_out is {w_out_EDF.dtype}; make them the same"
            )


def _back_end(x_TD: Tensor) -> ModuleType:
    if choose(x_TD) == "triton":
        from . import expert_mlp_triton

        return expert_mlp_triton
    return expert_mlp_cpu


_PLAN = "Tensor source_R, Tensor slot_TK, Tensor counts_E"
_REST = "Tensor w_in, Tensor w_out, Tensor? weights_TK, Tensor? b_in, Tensor? b_out, str activation"


@torch.library.custom_op(
    "coterie::expert_mlp", mutates_args=(), schema=f"(Tensor x_TD, {_PLAN}, {_REST}) -> (Tensor, Tensor)"
)
def _forward(x_TD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _back_end(x_TD).forward(x_TD.contiguous(), *rest)


@_forward.register_fake
def _(x_TD: Tensor, source_R: Tensor, slot_TK: Tensor, counts_E: Tensor, w_in: Tensor, *rest: Any):
    rows = source_R.shape[0] if choose(x_TD) == "triton" else expert_mlp_cpu.saved_rows(source_R.shape[0])
    return torch.empty_like(x_TD.contiguous()), x_TD.new_empty(rows, w_in.shape[1])


@torch.library.custom_op(
    "coterie::expert_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor dy_TD, Tensor x_TD, Tensor z_RN, {_PLAN}, {_REST}) -> Tensor[]",
)
def _backward(dy_TD: Tensor, x_TD: Tensor, *rest: Any) -> list[Tensor]:
    gradients = _back_end(x_TD).backward(dy_TD.contiguous(), x_TD.contiguous(), *rest)
    return [gradient for gradient in gradients if gradient is not None]


@_backward.register_fake
def _(dy_TD: Tensor, x_TD: Tensor, z_RN: Tensor, *rest: Any):
    operands = (x_TD, *rest[3:8])
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in operands if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or z, the largest tensor of all, gets a gradient of zeros
    ctx.save_for_backward(tensors[0], output[1], *tensors[1:])


def _differentiate(ctx: Any, dy_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 10
    operands = ctx.saved_tensors
    gradients = iter(_backward(dy_TD, *operands, ctx.activation))
    dx, *of_weights = (None if t is None else next(gradients) for t in (operands[0], *operands[5:]))
    return dx, None, None, None, *of_weights, None


_forward.register_autograd(_differentiate, setup_context=_save)
