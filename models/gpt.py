"""The decoder. It is written for one device and knows no mesh: `parallelize.py` gives it one.

B batch, S sequence, T = B * S tokens, D model, V vocabulary, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import native
from ..kernels.cross_entropy import linear_cross_entropy
from ..kernels.linear import linear
from ..kernels.norm_native import plus_
from ..kernels.rope import rope_table
from ..moe.balance import model_balance_loss, update_bias
from ..moe.experts import FeedForward, identity
from ..moe.gate import Routing, Stats, constant
from ..moe.layer import MoE
from .attention import Attention, Cache, scaled
from .config import ModelConfig
from .init import init_weights
from .layers import Embedding, Norm

Recompute = Literal["none", "selective", "full"]
"""What a block repeats in backward: nothing, its attention half (no exchange is repeated), or all from its input."""

# The gate seeds its own noise: no global random state needs to be kept.
_repeat = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Output(NamedTuple):
    """What one pass gives; every loss is a SUM over tokens, for the loop to divide by global counts."""

    logits_BSV: Tensor | None
    """None when targets were given: the loss never holds all logits."""
    lm: Tensor | None
    """fp32 sum of cross-entropy over targets that are not -100."""
    aux: Tensor
    """fp32 token sum of the load-balancing loss, summed over layers or (`aux_over`) of all together, not weighted."""
    z: Tensor
    """fp32 token sum of the router z-loss, summed over layers, not weighted."""
    stats: tuple[Stats, ...]
    """One per MoE layer."""
    routes: tuple[Tensor, ...]
    """One choices_TK per MoE layer; `forward(routes=...)` replays them."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), where the second may be a MoE layer."""

    def __init__(self, config: ModelConfig, layer: int, *, device=None, dtype=None) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layer = layer
        self.attention_norm = Norm(config.dim, config.norm, config.norm_eps, **kind)
        self.attention = Attention(config, **kind)
        self.mlp_norm = Norm(config.dim, config.norm, config.norm_eps, **kind)
        experts, moe = config.experts_of(layer), replace(config.moe, hidden=config.expert_hidden)
        self.moe = MoE(config.dim, experts, moe, **kind) if experts else None
        self.mlp = None if experts else _mlp(config, kind)

    def forward(
        self,
        x_BSD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        valid_BS: Tensor | None = None,
        cache: Cache | None = None,
        replay_TK: Tensor | None = None,
        history_E: Tensor | None = None,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, Routing | None]:
        """(y_BSD, routing of a MoE layer)."""
        if recompute != "full":
            half = recompute == "selective"
            return self._run(x_BSD, cos, sin, valid_BS, cache, replay_TK, history_E, half)
        gate = None if self.moe is None else self.moe.gate
        first: list[tuple[Tensor, int]] = []

        def run(x_BSD: Tensor) -> tuple[Tensor, Routing | None]:
            if gate is None or not first:
                y_BSD, routing = self._run(x_BSD, cos, sin, valid_BS, None, replay_TK, history_E)
                if gate is not None and routing is not None:
                    first.append((routing.choices_TK, gate.draws))
                return y_BSD, routing
            # Noise, or a tie broken otherwise, must not send the repeated pass to other experts.
            choices_TK, draws = first[0]
            now, gate.draws = gate.draws, draws
            try:
                return self._run(x_BSD, cos, sin, valid_BS, None, choices_TK, history_E)
            finally:
                gate.draws = now

        return _repeat(run, x_BSD)  # type: ignore[no-any-return]

    def attend(
        self, x_BSD: Tensor, cos: Tensor | None, sin: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """The attention half: (what the feed-forward half reads, what its answer is added to)."""
        a_BSD = self.attention(self.attention_norm(x_BSD), cos, sin, cache, self.layer)
        return self.mlp_norm.add(a_BSD, x_BSD)

    def _run(
        self,
        x_BSD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        valid_BS: Tensor | None,
        cache: Cache | None,
        replay_TK: Tensor | None,
        history_E: Tensor | None,
        repeat_attention: bool = False,
    ) -> tuple[Tensor, Routing | None]:
        attend = partial(_repeat, self.attend) if repeat_attention else self.attend
        h_BSD, x_BSD = attend(x_BSD, cos, sin, cache)  # type: ignore[misc]
        if self.moe is None:
            return plus_(x_BSD, self.mlp(h_BSD)), None  # type: ignore[misc]
        losses = cache is None or cache.losses
        out = self.moe(h_BSD, valid_BS, replay_TK=replay_TK, history_E=history_E, losses=losses)
        return plus_(x_BSD, out.y), out.routing


def _mlp(config: ModelConfig, kind: dict[str, Any]) -> FeedForward:
    return FeedForward(config.dim, config.hidden, activation=config.activation, bias=config.mlp_bias, **kind)


class GPT(nn.Module):
    """A pre-norm decoder with dense and MoE layers.

    Attributes:
        recompute: what a training step repeats in backward, on the same routes, so as to keep less: see `Recompute`.
        own, loss, logits: this rank's positions of (S,) or (B, S), and the head's two uses; `parallelize` replaces
            them where a rank holds some positions and some words.
    """

    def __init__(self, config: ModelConfig, device=None, dtype=None) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.recompute: Recompute = "none"
        self.own: Callable[[Tensor], Tensor] = identity
        self.loss: Callable[[Tensor, Tensor, Tensor], Tensor] = _loss
        self.logits: Callable[[Tensor, Tensor, int], Tensor] = _logits
        self.embed = Embedding(config.vocab_size, config.dim, **kind)
        learned = config.positions == "learned"
        self.positions = Embedding(config.max_positions, config.dim, **kind) if learned else None
        scaling = config.rope_scaling
        self.rope_scale = None if scaling is None else partial(scaled, scaling=scaling)
        self.blocks = nn.ModuleList(Block(config, layer, **kind) for layer in range(config.layers))
        self.final_norm = Norm(config.dim, config.norm, config.norm_eps, **kind)
        self.head = None if config.tied_head else nn.Linear(config.dim, config.vocab_size, bias=False, **kind)

    def init_weights(self, seed: int) -> None:
        """Sets every parameter and buffer from the seed and its own name, so that any layout starts alike."""
        init_weights(self, self.config, seed)

    @property
    def moe_layers(self) -> tuple[MoE, ...]:
        """The MoE layers, first to last: the order of stats, routes, history and counts."""
        return tuple(block.moe for block in self.blocks if block.moe is not None)  # type: ignore[misc]

    def update_biases(self, counts: tuple[Tensor, ...]) -> None:
        """One step of loss-free balancing. `counts`: per MoE layer, assignments of the global batch, (E,)."""
        speed = self.config.moe.gate.bias_update
        if speed:
            for moe, counts_E in zip(self.moe_layers, counts, strict=True):
                assert moe.gate.bias_E is not None  # the gate makes one whenever there is a speed
                update_bias(moe.gate.bias_E, counts_E, speed)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        *,
        targets_BS: Tensor | None = None,
        valid_BS: Tensor | None = None,
        cache: Cache | None = None,
        routes: tuple[Tensor, ...] | None = None,
        history: tuple[Tensor, ...] | None = None,
        logits_to_keep: int = 0,
        rows_R: Tensor | None = None,
    ) -> Output:
        """Logits, or the sum of the loss when targets are given.

        Args:
            tokens_BS: token ids.
            positions_BS: their positions, (S,) or (B, S); None: counted from the cache's length, or from 0.
            targets_BS: ids to predict; -100 is not counted.
            valid_BS: False for padding at the end of a sequence: no expert sees it and no statistic counts it.
            cache: keys and values of earlier tokens; the caller advances it. It may leave the router's losses at 0.
            routes: choices of an earlier pass over the same tokens, one (T, K) per MoE layer.
            history: per MoE layer, counts of the optimizer step's earlier micro-batches, (E,).
            logits_to_keep: only the last so many positions get logits; 0: all.
            rows_R: only these positions of the flattened (B * S) do: logits_BSV is (1, R, V).
        """
        x_BSD, cos, sin = self._embed(tokens_BS, positions_BS, cache.length if cache is not None else 0)
        valid_BS = None if valid_BS is None else self.own(valid_BS)
        recompute = self.recompute if cache is None and torch.is_grad_enabled() else "none"
        routings: list[Routing] = []
        for block in self.blocks:
            moe, n = block.moe is not None, len(routings)
            replay_TK = routes[n] if routes is not None and moe else None
            history_E = history[n] if history is not None and moe else None
            x_BSD, routing = block(x_BSD, cos, sin, valid_BS, cache, replay_TK, history_E, recompute)
            if routing is not None:
                routings.append(routing)
        x_BSD = x_BSD if rows_R is None else x_BSD.flatten(0, 1)[rows_R][None]
        logits, lm = self._head(x_BSD, targets_BS, logits_to_keep)
        if cache is None or cache.losses or not torch.is_inference_mode_enabled():
            zero = x_BSD.new_zeros((), dtype=torch.float32)
            aux, z = self._aux(routings, zero), sum((r.z for r in routings), zero)
        else:
            aux = z = constant(0.0, x_BSD.device)
        stats = tuple(r.stats for r in routings)
        return Output(logits, lm, aux, z, stats, tuple(r.choices_TK for r in routings))

    def _aux(self, routings: list[Routing], zero: Tensor) -> Tensor:
        layers = [r.balance for r in routings if r.balance is not None]
        own = sum((r.aux for r in routings), zero)
        return model_balance_loss(layers, self.config.moe.top_k) if layers else own

    def _embed(
        self, tokens_BS: Tensor, positions_BS: Tensor | None, start: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if positions_BS is None:
            end = start + tokens_BS.shape[1]
            if end > self.config.max_positions:
                raise ValueError(f"{end} tokens pass the model's {self.config.max_positions} positions")
            positions_BS = torch.arange(start, end, device=tokens_BS.device)
        x_BSD = self.embed(tokens_BS)
        if self.positions is not None:
            return plus_(x_BSD, self.positions(self.own(positions_BS)).expand_as(x_BSD)), None, None
        return x_BSD, *rope_table(positions_BS, self.config.width_per_head, self.config.rope_theta, self.rope_scale)

    def _head(self, x_BSD: Tensor, targets_BS: Tensor | None, keep: int) -> tuple[Tensor | None, Tensor | None]:
        weight = self.embed.weight if self.head is None else self.head.weight
        if targets_BS is None:
            return self.logits(self.final_norm(x_BSD), weight, keep), None
        return None, self.loss(self.final_norm(x_BSD), weight, targets_BS)


def _loss(x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
    return linear_cross_entropy(x_BSD.flatten(0, 1), weight_VD, targets_BS.flatten())


def _logits(x_BSD: Tensor, weight_VD: Tensor, keep: int) -> Tensor:
    x_BSD = x_BSD[:, -keep:]
    return linear(x_BSD, weight_VD) if native.ready(x_BSD, weight_VD) else x_BSD @ weight_VD.T
