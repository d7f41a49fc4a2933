"""Feed-forward networks: the stacked experts of a MoE layer, and the dense one that is also the shared expert."""

# Shapes: T tokens, D model, E experts, K choices, F hidden, N = 2F (swiglu) or F (gelu).

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.expert_mlp import expert_mlp
from ..kernels.expert_mlp_packed import PackedExperts, can_pack
from ..kernels.linear import linear
from ..kernels.permute import Plan

_FEW = 64  # rows for which starting an operation costs more than its work


def in_width(hidden: int, activation: str) -> int:
    """N: rows of `w_in`, gate then up for swiglu."""
    return 2 * hidden if activation == "swiglu" else hidden


class Experts(nn.Module):
    """E feed-forward networks, stacked: w_in (E, N, D), w_out (E, D, F), optional b_in (E, N), b_out (E, D).

    Swiglu: w_out (silu(gate) * up) with gate, up = the halves of w_in x; gelu: w_out gelu_tanh(w_in x). Under expert
    parallelism the parameters are DTensors sharded by expert, and a call computes this rank's experts alone.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        width = in_width(hidden, activation)
        self.w_in = nn.Parameter(torch.empty(num_experts, width, dim, **at))
        self.w_out = nn.Parameter(torch.empty(num_experts, dim, hidden, **at))
        self.b_in = nn.Parameter(torch.empty(num_experts, width, **at)) if bias else None
        self.b_out = nn.Parameter(torch.empty(num_experts, dim, **at)) if bias else None
        self.packed: PackedExperts | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self)

    def pack(self) -> None:
        """Keeps the weights a second time, as the products of a CPU read them: for calls without gradients, until
        the weights change. Elsewhere it does nothing."""
        w_in, w_out = _local(self.w_in), _local(self.w_out)
        self.packed = PackedExperts(w_in, w_out, self.activation) if can_pack(w_in) else None

    def train(self, mode: bool = True) -> Experts:
        """Training writes to the weights in ways that a pack may not see, so it drops the pack."""
        if mode:
            self.packed = None
        super().train(mode)
        return self

    def forward(self, x_TD: Tensor, plan: Plan, weights_TK: Tensor | None = None) -> Tensor:
        """y_t = sum_k w_tk * expert(x_t) over the rows of `plan`; weights of None mean ones."""
        w_in, w_out = _local(self.w_in), _local(self.w_out)
        b_in, b_out = (None if b is None else _local(b) for b in (self.b_in, self.b_out))
        if self.packed is not None and not torch.is_grad_enabled() and can_pack(w_in):
            if self.packed.fresh(w_in, w_out):
                return self.packed(x_TD, plan, weights_TK, b_in, b_out)
            self.packed = None
        return expert_mlp(
            x_TD, plan, w_in, w_out, weights_TK=weights_TK, b_in_EN=b_in, b_out_ED=b_out, activation=self.activation
        )


class FeedForward(nn.Module):
    """One dense network of the same kinds: w_in (N, D), w_out (D, F), optional b_in (N,), b_out (D,)."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        width = in_width(hidden, activation)
        self.w_in = nn.Parameter(torch.empty(width, dim, **at))
        self.w_out = nn.Parameter(torch.empty(dim, hidden, **at))
        self.b_in = nn.Parameter(torch.empty(width, **at)) if bias else None
        self.b_out = nn.Parameter(torch.empty(dim, **at)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        many = torch.is_grad_enabled() or x.numel() >= _FEW * x.shape[-1]
        if many and x.device.type == "cpu" and x.dtype == self.w_in.dtype == torch.float32:
            return self._as_one_expert(x)
        z = linear(x, self.w_in, self.b_in)
        if self.activation == "swiglu":
            gate, up = z.chunk(2, -1)
            a = F.silu(gate) * up
        else:
            a = F.gelu(z, approximate="tanh")
        return linear(a, self.w_out, self.b_out)

    def _as_one_expert(self, x: Tensor) -> Tensor:
        # In fp32 on a CPU the experts' operation takes 0.6 of the time, and keeps less for the backward pass.
        x_TD = x.reshape(-1, x.shape[-1])
        rows_T = torch.arange(len(x_TD))
        y_TD = expert_mlp(
            x_TD,
            Plan(rows_T, rows_T[:, None], torch.full((1,), len(x_TD))),
            self.w_in[None],
            self.w_out[None],
            b_in_EN=None if self.b_in is None else self.b_in[None],
            b_out_ED=None if self.b_out is None else self.b_out[None],
            activation=self.activation,
        )
        return y_TD.view(x.shape)


def _reset(module: Experts | FeedForward) -> None:
    for weight in (module.w_in, module.w_out):
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    for bias in (module.b_in, module.b_out):
        if bias is not None:
            nn.init.zeros_(bias)


def _local(parameter: Tensor) -> Tensor:
    """This rank's experts where the parameter is sharded, else the parameter."""
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()
