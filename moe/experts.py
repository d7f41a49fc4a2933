"""Feed-forward networks: the stacked experts of a MoE layer, and the dense one that is also the shared expert."""

# Shapes: T tokens, D model, E experts, K choices, F hidden, P 2 (swiglu: gate, up) or 1 (gelu), N = P F.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import expert_decode_triton, expert_native
from ..kernels.expert_mlp import expert_mlp
from ..kernels.linear import linear
from ..kernels.permute import Plan, plan_rows
from ..parallel.tensor import local_part

_FEW = 64  # rows for which starting an operation costs more than its work


def projections(activation: str) -> int:
    """P: gate and up for swiglu, one for gelu."""
    return 2 if activation == "swiglu" else 1


def identity(x: Tensor) -> Tensor:
    """What a hook is on one device."""
    return x


class Chunks(NamedTuple):
    """Rows that arrive piece by piece: piece c is for the c-th of `number` equal shares of a rank's experts."""

    number: int
    pieces: Iterator[tuple[Tensor, Plan]]
    answer: Callable[[Tensor], None]
    """Takes a piece's answers as soon as they are there."""


class Experts(nn.Module):
    """E feed-forward networks, stacked: w_in (E, P, F, D), w_out (E, D, F), optional b_in (E, P, F), b_out (E, D).

    Swiglu: w_out (silu(gate) * up) with gate, up = w_in x; gelu: w_out gelu_tanh(w_in x). On a mesh the parameters
    are DTensors cut by expert, and by F where ranks slice an expert: a call computes what this rank holds. `slices`
    (`moe.slices`) then goes around each call, and `once` lets the sum over slices hold b_out once.
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
        shape = projections(activation), hidden
        self.w_in = nn.Parameter(torch.empty(num_experts, *shape, dim, **at))
        self.w_out = nn.Parameter(torch.empty(num_experts, dim, hidden, **at))
        self.b_in = nn.Parameter(torch.empty(num_experts, *shape, **at)) if bias else None
        self.b_out = nn.Parameter(torch.empty(num_experts, dim, **at)) if bias else None
        self.once: Callable[[Tensor], Tensor] = identity
        self.slices: Callable[[Callable[..., Tensor], Tensor, Plan, Tensor | None], Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self)

    def forward(
        self,
        x_TD: Tensor | Chunks,
        plan: Plan | Tensor | None = None,
        weights_TK: Tensor | None = None,
        *,
        own: bool = False,
    ) -> Tensor | list[Tensor]:
        """y_t = sum_k w_tk * expert(x_t) over the rows of `plan`, or over a router's choices ids_TK, of which -1 is
        none; weights of None mean ones. For `Chunks` the answers of all pieces.

        own: of choices, what this rank's slices add to the answers; the caller sums over the ranks.
        """
        if isinstance(x_TD, Chunks):
            return self._by_pieces(x_TD, self._own())
        assert plan is not None
        if isinstance(plan, Tensor):
            return self._chosen(x_TD, plan, weights_TK, own or self.slices is None)
        return self._sliced(self._own(), x_TD, plan, weights_TK)

    def _chosen(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor | None, alone: bool) -> Tensor:
        own = self._own()
        if alone and expert_native.ready(x_TD, *own):
            return expert_native.experts(x_TD, ids_TK, weights_TK, *own, activation=self.activation)
        if alone and expert_decode_triton.ready(x_TD, *own):
            return expert_decode_triton.expert_decode_triton(
                x_TD, ids_TK, weights_TK, *own, activation=self.activation
            )
        run = self._compute if alone else self._sliced
        return run(own, x_TD, plan_rows(ids_TK, len(own[1])), weights_TK)

    def _own(self) -> list[Any]:
        """w_in (E, N, D), w_out, b_in (E, N), b_out of this rank."""
        b_in = None if self.b_in is None else local_part(self.b_in).flatten(1)
        b_out = None if self.b_out is None else self.once(local_part(self.b_out))
        return [local_part(self.w_in).flatten(1, 2), local_part(self.w_out), b_in, b_out]

    def _by_pieces(self, chunks: Chunks, own: Sequence[Any]) -> list[Tensor]:
        shares = [[None] * chunks.number if part is None else part.chunk(chunks.number) for part in own]
        answers = []
        for (x_QD, plan), *some in zip(chunks.pieces, *shares, strict=True):
            answers.append(self._sliced(some, x_QD, plan, None))
            chunks.answer(answers[-1])
        return answers

    def _sliced(self, own: Sequence[Any], *rows: Any) -> Tensor:
        compute = partial(self._compute, own)
        return compute(*rows) if self.slices is None else self.slices(compute, *rows)

    def _compute(self, own: Sequence[Any], x_TD: Tensor, plan: Plan, weights_TK: Tensor | None) -> Tensor:
        w_in, w_out, b_in, b_out = own
        return expert_mlp(
            x_TD, plan, w_in, w_out, weights_TK=weights_TK, b_in_EN=b_in, b_out_ED=b_out, activation=self.activation
        )


class FeedForward(nn.Module):
    """One dense network of the same kinds: w_in (P, F, D), w_out (D, F), optional b_in (P, F), b_out (D,).

    The hooks are those of `Attention`: where each rank holds a slice of F, `enter` gathers the sequence, `leave` sums
    the ranks' answers, and `once` lets that sum hold b_out once.
    """

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
        shape = projections(activation), hidden
        self.w_in = nn.Parameter(torch.empty(*shape, dim, **at))
        self.w_out = nn.Parameter(torch.empty(dim, hidden, **at))
        self.b_in = nn.Parameter(torch.empty(*shape, **at)) if bias else None
        self.b_out = nn.Parameter(torch.empty(dim, **at)) if bias else None
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity
        self.once: Callable[[Tensor], Tensor] = identity
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        w_ND, w_DF = local_part(self.w_in).flatten(0, 1), local_part(self.w_out)
        b_N = None if self.b_in is None else local_part(self.b_in).flatten()
        b_D = None if self.b_out is None else self.once(self.b_out)
        if expert_native.ready(x, w_ND, w_DF, b_N, b_D):
            x = self.enter(x)
            return self.leave(expert_native.feed_forward(x.contiguous(), w_ND, w_DF, b_N, b_D, self.activation))
        many = torch.is_grad_enabled() or x.numel() >= _FEW * x.shape[-1]
        fast = many and x.device.type == "cpu" and x.dtype == w_ND.dtype == torch.float32
        run = self._as_one_expert if fast else self._plain
        return self.leave(run(self.enter(x), w_ND, w_DF, b_N, b_D))

    def _plain(self, x: Tensor, w_ND: Tensor, w_DF: Tensor, b_N: Tensor | None, b_D: Tensor | None) -> Tensor:
        z = linear(x, w_ND, b_N)
        if self.activation == "swiglu":
            gate, up = z.chunk(2, -1)
            a = F.silu(gate) * up
        else:
            a = F.gelu(z, approximate="tanh")
        return linear(a, w_DF, b_D)

    def _as_one_expert(self, x: Tensor, w_ND: Tensor, w_DF: Tensor, b_N: Tensor | None, b_D: Tensor | None) -> Tensor:
        # In fp32 on a CPU the experts' operation takes 0.6 of the time, and keeps less for the backward pass.
        x_TD = x.reshape(-1, x.shape[-1])
        rows_T = torch.arange(len(x_TD))
        y_TD = expert_mlp(
            x_TD,
            Plan(rows_T, rows_T[:, None], torch.full((1,), len(x_TD))),
            w_ND[None],
            w_DF[None],
            b_in_EN=None if b_N is None else b_N[None],
            b_out_ED=None if b_D is None else b_D[None],
            activation=self.activation,
        )
        return y_TD.view(x.shape)


def _reset(module: Experts | FeedForward) -> None:
    for weight in (module.w_in, module.w_out):
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    for bias in (module.b_in, module.b_out):
        if bias is not None:
            nn.init.zeros_(bias)
