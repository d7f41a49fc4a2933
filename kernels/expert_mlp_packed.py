"""`expert_mlp` without gradients on a CPU, from weights packed once into the form that its products read.

A product packs its weights on every call, which is a third of its time in bf16 when an expert has few rows.
Shapes: T tokens, D model, E experts, K choices, R routed rows, S rows of a block, F hidden, N = 2F or F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose
from .expert_mlp import check
from .expert_mlp_cpu import Rows, activate
from .permute import Plan

_ROWS = 64  # the pack is laid out for products of about so many rows; any number may follow


class PackedExperts:
    """A second copy of stacked weights, good until the first copy changes. A write through `.data` is not seen."""

    def __init__(self, w_in_END: Tensor, w_out_EDF: Tensor, activation: str) -> None:
        self._of = (w_in_END.detach(), w_out_EDF.detach())  # held, so that no other tensor gets their address
        self._state = _state(w_in_END, w_out_EDF)
        self._activation = activation
        self._w_in, self._w_out = ([_pack(w) for w in stacked.unbind()] for stacked in self._of)

    def fresh(self, w_in_END: Tensor, w_out_EDF: Tensor) -> bool:
        """Whether these are the packed weights, not written to since."""
        return self._state == _state(w_in_END, w_out_EDF)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copied module has weights of its own, and so no pack."""

    def __call__(
        self,
        x_TD: Tensor,
        plan: Plan,
        weights_TK: Tensor | None = None,
        b_in_EN: Tensor | None = None,
        b_out_ED: Tensor | None = None,
    ) -> Tensor:
        """`expert_mlp` of the packed weights: (T, D) -> (T, D), no gradient."""
        check(x_TD, plan, *self._of, weights_TK, b_in_EN, b_out_ED, self._activation)
        rows = Rows(*plan)
        y_RD = x_TD.new_empty(rows.used, x_TD.shape[1])
        x_MD = x_TD.new_empty(rows.most, x_TD.shape[1])
        for block, parts in rows.blocks():
            x_SD = rows.gather(x_TD, block, x_MD[: block.stop - block.start])
            z_SN = _products(x_SD, parts, self._w_in, b_in_EN)
            a_SF = z_SN.new_empty(len(z_SN), self._of[1].shape[2])
            y_RD[block] = _products(activate(z_SN, self._activation, a_SF, a_SF), parts, self._w_out, b_out_ED)
        return rows.combine(y_RD, weights_TK)


def can_pack(x: Tensor) -> bool:
    """Whether this tensor's products have a packed form here."""
    if x.device.type != "cpu" or choose(x) == "reference" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.enabled:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(w_ND: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(w_ND.contiguous(), _ROWS)


def _products(x_SK: Tensor, parts: list[tuple[int, slice]], packed: list[Tensor], b_EN: Tensor | None) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise
    answers = [product(x_SK[part], packed[e], None if b_EN is None else b_EN[e], "none", [], "") for e, part in parts]
    return answers[0] if len(answers) == 1 else torch.cat(answers)


def _state(*tensors: Tensor) -> tuple[tuple[int, int], ...]:
    # Tensors made in inference mode count no versions: nothing may write to them later.
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
