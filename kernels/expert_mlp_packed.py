"""`expert_mlp` without gradients on a CPU, from weights packed once into the form that its products read.

A product packs its weights on every call: for bf16 experts with few rows each that is most of the time. Activations
run inside the products, so nothing but the hidden rows is written between the two.
Shapes: T tokens, D model, E experts, K choices, R routed rows, S rows of one expert, F hidden, N = 2F or F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose
from .expert_mlp_cpu import Rows
from .permute import Plan

_ROWS = 64  # the pack is laid out for products of about so many rows; any number may follow


class PackedExperts:
    """A second copy of stacked weights, good until the first copy changes."""

    def __init__(self, w_in_END: Tensor, w_out_EDF: Tensor, activation: str) -> None:
        self._of = (w_in_END.detach(), w_out_EDF.detach())  # held, so that no other tensor gets their address
        self._state = _state(w_in_END, w_out_EDF)
        w_out = [_pack(w_DF) for w_DF in self._of[1].unbind()]
        # The halves of swiglu are two products: the second one multiplies by the first one's answer.
        parts = self._of[0].chunk(2 if activation == "swiglu" else 1, 1)
        self._experts = list(zip(*([_pack(w) for w in part.unbind()] for part in parts), w_out, strict=True))

    def fresh(self, w_in_END: Tensor, w_out_EDF: Tensor) -> bool:
        """Whether these are the packed weights, not written to since."""
        return self._state == _state(w_in_END, w_out_EDF)

    def __call__(
        self,
        x_TD: Tensor,
        plan: Plan,
        weights_TK: Tensor | None = None,
        b_in_EN: Tensor | None = None,
        b_out_ED: Tensor | None = None,
    ) -> Tensor:
        """`expert_mlp` of the packed weights: (T, D) -> (T, D), no gradient."""
        rows = Rows(*plan)
        y_RD = x_TD.new_empty(rows.used, x_TD.shape[1])
        x_MD = x_TD.new_empty(rows.most, x_TD.shape[1])
        for block, parts in rows.blocks():
            x_SD, y_SD = rows.gather(x_TD, block, x_MD[: block.stop - block.start]), y_RD[block]
            for e, part in parts:
                b_N = None if b_in_EN is None else b_in_EN[e]
                b_D = None if b_out_ED is None else b_out_ED[e]
                y_SD[part] = _product(self._hidden(e, x_SD[part], b_N), self._experts[e][-1], b_D)
        return rows.combine(y_RD, weights_TK)

    def _hidden(self, e: int, x_SD: Tensor, b_N: Tensor | None) -> Tensor:
        if len(self._experts[e]) == 2:
            return _product(x_SD, self._experts[e][0], b_N, "gelu", "tanh")
        w_gate, w_up, _ = self._experts[e]
        b_gate, b_up = (None, None) if b_N is None else b_N.chunk(2)
        gate_SF = _product(x_SD, w_gate, b_gate, "swish")
        return torch.ops.mkldnn._linear_pointwise.binary(x_SD, gate_SF, w_up, b_up, "mul")


def can_pack(x: Tensor) -> bool:
    """Whether this tensor's products have a packed form here."""
    if x.device.type != "cpu" or choose(x) == "reference" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.enabled:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(w_ND: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(w_ND.contiguous(), _ROWS)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, then: str = "none", kind: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], kind)


def _state(*tensors: Tensor) -> tuple[tuple[int, int], ...]:
    # Tensors made in inference mode count no versions: nothing may write to them later.
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
