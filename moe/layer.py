"""The MoE layer: gate -> dispatch -> experts -> combine, with a residual MLP or a shared expert beside them."""

# Shapes: B batch, S sequence, T = B * S tokens, D model, E experts, K choices.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import native
from ..kernels.gate_native import mix_, scale_by_sigmoid_
from ..kernels.linear import linear
from ..kernels.norm_native import plus_
from .config import MoEConfig
from .dispatch import Dispatch, LocalDispatch
from .experts import Experts, FeedForward
from .gate import Gate, Routing


class MoEOutput(NamedTuple):
    """The layer's answer (B, S, D), and all that the router has to say."""

    y: Tensor
    routing: Routing


class MoE(nn.Module):
    """A feed-forward layer of `num_experts` experts, of which a token visits `config.top_k`.

    residual: y = c_0 * experts(x) + c_1 * mlp(x) with c = softmax(Linear(D, 2)(x)) (DeepSpeed's released code; the
    paper's text has the plain sum). shared: y = experts(x) + [sigmoid(Linear(D, 1)(x)) *] shared(x).
    Padding tokens get no experts, so their answer is that of the residual MLP and the shared expert alone.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        config: MoEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config.check(num_experts)
        if config.hidden < 1:
            raise ValueError("a MoE layer needs the width of its experts: MoEConfig.hidden > 0")
        self.config, self.num_experts = config, num_experts
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        kind: dict[str, Any] = {"activation": config.activation, "bias": config.bias, **at}
        self.gate = Gate(dim, num_experts, config.top_k, config.gate, device=device)
        self.experts = Experts(dim, config.hidden, num_experts, **kind)
        self.residual = FeedForward(dim, config.hidden, **kind) if config.residual else None
        self.coefficient = nn.Linear(dim, 2, **at) if config.residual else None
        self.shared = FeedForward(dim, config.shared_hidden, **kind) if config.shared_hidden else None
        self.shared_gate = nn.Linear(dim, 1, bias=False, **at) if config.shared_gate else None
        self.dispatch: Dispatch = LocalDispatch()

    def forward(
        self,
        x_BSD: Tensor,
        valid_BS: Tensor | None = None,
        *,
        replay_TK: Tensor | None = None,
        history_E: Tensor | None = None,
        losses: bool = True,
    ) -> MoEOutput:
        """See `Gate.forward` for the arguments."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = self.gate(
            x_TD,
            None if valid_BS is None else valid_BS.reshape(-1),
            sequence_length=x_BSD.shape[-2],
            replay_TK=replay_TK,
            history_E=history_E,
            losses=losses,
        )
        finish = self.dispatch.start(x_TD, routing)  # rows travel while the dense parts compute
        logits_T2, residual_TD, shared_TD = self._beside(x_TD)
        y_TD = finish(self.experts)
        rows = self.dispatch.rows(routing)
        if rows is not routing.stats.rows:
            routing = routing._replace(stats=routing.stats._replace(rows=rows))
        if logits_T2 is not None and residual_TD is not None:
            y_TD = mix_(y_TD, residual_TD, logits_T2)
        if shared_TD is not None:
            y_TD = plus_(y_TD, shared_TD)
        return MoEOutput(y_TD.view(x_BSD.shape), routing)

    def _beside(self, x_TD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What needs no expert: logits (T, 2) of the residual's weights, its answer, the shared answer; None
        without one."""
        logits_T2 = residual_TD = shared_TD = None
        if self.residual is not None and self.coefficient is not None:
            logits_T2 = _dense(self.coefficient, x_TD)
            residual_TD = self.residual(x_TD)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = scale_by_sigmoid_(shared_TD, _dense(self.shared_gate, x_TD))
        return logits_T2, residual_TD, shared_TD


def _dense(layer: nn.Linear, x_TD: Tensor) -> Tensor:
    # torch's own product gives a token other bits in other company, which inference must not.
    return linear(x_TD, layer.weight, layer.bias) if native.ready(x_TD, layer.weight) else layer(x_TD)
