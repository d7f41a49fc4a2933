"""The router: logits, choices, weights, drops and balance losses of one MoE layer, as values."""

# Shapes: T tokens, D model, E experts, K choices, A = T * K assignments.

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import gate_native, route_triton
from ..kernels.gate import Gated, gate
from ..kernels.linear import linear
from ..kernels.permute import plan_rows
from .balance import Balance, balance_loss, fractions, sequence_balance_loss, z_loss
from .config import GateConfig

SMALLEST = 1e-20  # keeps 0 / 0 out of the weights of a token without choices


class Stats(NamedTuple):
    """What happened in one layer on this rank. Tensors on the layer's device; sums, so that they add up."""

    asked_E: Tensor  # int64: assignments per expert before drops
    kept_E: Tensor  # int64: assignments per expert after drops
    entropy: Tensor  # fp32: sum over tokens of the router's entropy / log E
    rows: Tensor  # int64: rows that experts compute for this rank's tokens, padding included
    tokens: Tensor  # int64: valid tokens


class Routing(NamedTuple):
    """Where the tokens go. `aux` and `z` are token SUMS without their weights, and carry a gradient only where the
    configured weight is not zero."""

    choices_TK: Tensor  # int64: the experts chosen, -1 for padding; what a replay needs
    ids_TK: Tensor  # int64: the same with drops as -1
    weights_TK: Tensor  # fp32: renormalised and scaled, zero where dropped
    aux: Tensor  # zero with `aux_over="model"`: see `balance`
    z: Tensor
    stats: Stats
    balance: Balance | None = None  # for `model_balance_loss`, with `aux_over="model"` alone


class Gate(nn.Module):
    """Chooses `top_k` of `num_experts` for every token, in fp32, ties to the lowest index.

    `weight` (E, D) is an fp32 parameter. `bias_E`, when `config.bias_update` > 0, is an fp32 buffer that takes part
    in the choice and never in the weights (DeepSeek-V3; HF's `e_score_correction_bias`).
    `reduce_counts` sums counts over all ranks for `aux_scope="global"`, `reduce_sequences` those of a sequence over
    the ranks that share it, for `aux_scope="sequence"`; both are the identity on one rank.
    `noise_seed` and `draws` seed this layer's own noise: see `seed_noise`.
    """

    bias_E: Tensor | None

    def __init__(
        self, dim: int, num_experts: int, top_k: int, config: GateConfig, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.config = num_experts, top_k, config
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=torch.float32))
        bias_E = torch.zeros(num_experts, device=device) if config.bias_update > 0 else None
        self.register_buffer("bias_E", bias_E)
        self.reduce_counts: Callable[[Tensor], Tensor] = _identity
        self.reduce_sequences: Callable[[Tensor], Tensor] = _identity
        self.noise_seed, self.draws = 0, 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        before = self.bias_E
        super()._apply(fn, recurse)
        if before is not None and self.bias_E is not None and self.bias_E.dtype != torch.float32:
            self.bias_E = before.to(self.bias_E.device)  # its steps of 1e-3 do not survive bf16
        return self

    def capacity(self, tokens: int) -> int | None:
        """Rows that one expert takes from `tokens` tokens of one rank, by the mode the module is in; None: all.

        max(ceil(T * k / E * factor), min_capacity): DeepSpeed's, by the tokens of this rank. (Tutel rounds T / E up
        first.) Padding does not count as tokens.
        """
        factor = self._factor()
        if factor is None:
            return None
        return max(math.ceil(tokens * self.top_k / self.num_experts * factor - 1e-6), self.config.min_capacity)

    def _factor(self) -> float | None:
        return self.config.capacity_factor if self.training else self.config.eval_capacity_factor

    def forward(
        self,
        x_TD: Tensor,
        valid_T: Tensor | None = None,
        *,
        sequence_length: int | None = None,
        replay_TK: Tensor | None = None,
        history_E: Tensor | None = None,
        generator: torch.Generator | None = None,
        losses: bool = True,
    ) -> Routing:
        """Routes T tokens.

        Args:
            x_TD: the tokens, any floating dtype.
            valid_T: False marks padding: no experts, no capacity, no losses, no counts.
            sequence_length: positions of each sequence in x_TD; `aux_scope="sequence"` needs it.
            replay_TK: recorded `choices_TK`; nothing is chosen, weights and losses come from the live logits.
            history_E: this rank's `asked_E` of the earlier micro-batches of the same optimizer step. The global
                scope adds them, so the last micro-batch sees the whole batch's fractions (arXiv 2501.11873).
            generator: draws the noise in place of the layer's own.
            losses: False leaves aux, z and the entropy at 0, as generation reads none of them.
        """
        asked = valid_T is None and replay_TK is None
        if asked and not losses and self._is_plain():
            if gate_native.ready(x_TD, self.weight, self.bias_E):
                return self._infer(gate_native.route, x_TD)
            if route_triton.ready(x_TD, self.weight):
                return self._infer(route_triton.route, x_TD)
        if generator is None:
            generator = self._own_generator(x_TD.device, replaying=replay_TK is not None)
        logits_TE = self._logits(x_TD, generator)
        sampled_TK = self._sample(logits_TE, generator)  # in a replay too: the noise of drops comes after it
        ids_TK = sampled_TK if replay_TK is None else replay_TK
        gated = self._gate(logits_TE, self.top_k, valid_T, ids_TK)
        tokens = torch.full((), len(x_TD), device=x_TD.device) if valid_T is None else valid_T.sum()
        ids_TK, kept_E = self._drop(gated, None if valid_T is None else tokens, generator)
        weights_TK = self._weigh(gated, ids_TK)
        aux = z = entropy = logits_TE.new_zeros(())
        balance = None
        if losses:
            aux, z, entropy, balance = self._losses(logits_TE, gated, valid_T, sequence_length, history_E)
        stats = Stats(gated.counts_E, kept_E, entropy, kept_E.sum(), tokens)
        return Routing(gated.ids_TK, ids_TK, weights_TK, aux, z, stats, balance)

    def _is_plain(self) -> bool:
        """No noise and no drops: the choice is a function of the token alone."""
        return not self.training and self.config.eval_capacity_factor is None

    def _infer(self, route: Callable[..., tuple[Tensor, Tensor, Tensor]], x_TD: Tensor) -> Routing:
        config = self.config
        ids_TK, weights_TK, counts_E = route(
            x_TD,
            self.weight,
            self.bias_E,
            self.top_k,
            score=config.score,
            groups=config.groups,
            topk_groups=config.topk_groups,
            renormalize=config.renormalize != "none" and self.top_k > 1,
            scale=config.route_scale,
        )
        zero, tokens, rows = (constant(n, x_TD.device) for n in (0.0, len(x_TD), ids_TK.numel()))
        return Routing(ids_TK, ids_TK, weights_TK, zero, zero, Stats(counts_E, counts_E, zero, rows, tokens))

    def _losses(
        self,
        logits_TE: Tensor,
        gated: Gated,
        valid_T: Tensor | None,
        sequence_length: int | None,
        history_E: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Balance | None]:
        """aux, z and balance as `Routing` has them, and before the last the entropy of `Stats`."""
        probs_TE = self._probs(gated.scores_TE, valid_T)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.aux_weight > 0):
            aux, balance = self._aux(probs_TE, gated, sequence_length, history_E)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.z_weight > 0):
            z = z_loss(logits_TE, valid_T)
        with torch.no_grad():
            entropy = torch.special.entr(probs_TE).sum() / math.log(max(self.num_experts, 2))
        return aux, z, entropy, balance

    def _logits(self, x_TD: Tensor, generator: torch.Generator | None) -> Tensor:
        x_TD = x_TD.float()
        if self.training and self.config.noise == "jitter":
            noise_TD = torch.rand(x_TD.shape, device=x_TD.device, generator=generator)
            x_TD = x_TD * (1 + self.config.jitter_eps * (2 * noise_TD - 1))
        with torch.autocast(x_TD.device.type, enabled=False):
            return linear(x_TD, self.weight.float())

    def _gate(self, logits_TE: Tensor, top_k: int, valid_T: Tensor | None, ids_TK: Tensor | None) -> Gated:
        config = self.config
        return gate(
            logits_TE,
            top_k,
            score=config.score,
            bias_E=self.bias_E,
            groups=config.groups,
            topk_groups=config.topk_groups,
            valid_T=valid_T,
            ids_TK=ids_TK,
        )

    @torch.no_grad()
    def _sample(self, logits_TE: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """Choices that need noise; None leaves them to the kernel. DeepSpeed samples in evaluation too: not here."""
        sampled_second = self.config.second_expert == "sampled"
        if not self.training or not (sampled_second or self.config.noise == "gumbel"):
            return None
        noise_TE = torch.empty_like(logits_TE).exponential_(generator=generator)  # -log of it is Gumbel(0, 1)
        noisy_TK = self._gate(logits_TE - noise_TE.log(), self.top_k, None, None).ids_TK
        if self.config.noise == "gumbel":  # every choice is drawn, the second one too
            return noisy_TK
        first_T1 = self._gate(logits_TE, 1, None, None).ids_TK
        second_T1 = torch.where(noisy_TK[:, :1] == first_T1, noisy_TK[:, 1:], noisy_TK[:, :1])
        return torch.cat([first_T1, second_T1], 1)

    @torch.no_grad()
    def _drop(self, gated: Gated, tokens: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Choices beyond an expert's capacity become -1; also the counts that stay."""
        ids_TK = gated.ids_TK
        factor, limit = self._factor(), self.capacity(len(ids_TK))
        if factor is None or limit is None:
            return ids_TK, gated.counts_E
        if tokens is not None:  # the count of valid tokens lives on the device: no sync
            rows = tokens.double() * self.top_k / self.num_experts * factor
            limit = torch.ceil(rows - 1e-6).clamp(min=self.config.min_capacity).long()
        order_A = self._order(gated, generator)
        plan = plan_rows(ids_TK.flatten()[order_A][:, None], self.num_experts)
        first_E = gated.counts_E.cumsum(0) - gated.counts_E
        slot_A = torch.empty_like(order_A).scatter_(0, order_A, plan.slot_TK[:, 0])
        rank_TK = slot_A.view(ids_TK.shape) - first_E[ids_TK.clamp(min=0)]
        return ids_TK.masked_fill(rank_TK >= limit, -1), gated.counts_E.clamp(max=limit)

    def _order(self, gated: Gated, generator: torch.Generator | None) -> Tensor:
        """The order in which assignments t * K + k enter their experts, as a permutation.

        position: all first choices by token, then all second ones (DeepSpeed's top-2; its top-k takes all choices of
        a token at once). probability: by the raw score, whatever the bias and renormalisation (DeepSpeed since #7986;
        Megatron ranks renormalised probabilities), ties to the earliest. random: uniform (DeepSpeed RTS).
        """
        T, K = gated.ids_TK.shape
        policy, device = self.config.drop_policy, gated.ids_TK.device
        if policy == "position":
            return torch.arange(T * K, device=device).view(T, K).t().flatten()
        if policy == "probability":
            return gated.weights_TK.detach().flatten().argsort(descending=True, stable=True)
        return torch.rand(T * K, device=device, generator=generator).argsort(stable=True)

    def _weigh(self, gated: Gated, ids_TK: Tensor) -> Tensor:
        """before_drop: drops leave the other weights alone (Megatron, HF); after_drop: the kept ones sum to one
        (DeepSpeed's top-2 and top-k); none, or k = 1: raw scores (Switch, OLMoE, DeepSpeed's top-1)."""
        weights_TK, mode = gated.weights_TK, self.config.renormalize if self.top_k > 1 else "none"
        if mode == "before_drop":
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=SMALLEST)
        if ids_TK is not gated.ids_TK:
            weights_TK = weights_TK.masked_fill(ids_TK < 0, 0)
        if mode == "after_drop":
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=SMALLEST)
        return weights_TK if self.config.route_scale == 1 else weights_TK * self.config.route_scale

    def _probs(self, scores_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """Scores that sum to one (sigmoid ones over their sum, as DeepSeek-V3 and Megatron do); 0 in padding."""
        if self.config.score == "sigmoid":
            scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=SMALLEST)
        return scores_TE if valid_T is None else scores_TE.where(valid_T[:, None], 0)

    def _aux(
        self, probs_TE: Tensor, gated: Gated, sequence_length: int | None, history_E: Tensor | None
    ) -> tuple[Tensor, Balance | None]:
        """(this layer's loss, its part of a loss over all layers)."""
        if self.config.aux_scope == "sequence":
            if sequence_length is None:
                raise ValueError("aux_scope='sequence' needs the sequence length of the batch")
            return sequence_balance_loss(probs_TE, gated.ids_TK, sequence_length, self.reduce_sequences), None
        counts_E = gated.counts_E
        if self.config.aux_scope == "global" and self.training and self.config.aux_weight > 0:
            counts_E = self.reduce_counts(counts_E if history_E is None else counts_E + history_E)
        if self.config.aux_over == "model":
            return probs_TE.new_zeros(()), Balance(counts_E, probs_TE.sum(0))
        return balance_loss(probs_TE, fractions(counts_E)), None

    def _own_generator(self, device: torch.device, replaying: bool) -> torch.Generator | None:
        """A replay repeats the noise of the last forward, so recomputation finds the same weights and drops."""
        config = self.config
        noisy = self.training and (config.noise != "none" or config.second_expert == "sampled")
        drawn = config.drop_policy == "random" and self._factor() is not None
        if not (noisy or drawn) or device.type == "meta":
            return None
        if self.training and not replaying:
            self.draws += 1
        return torch.Generator(device).manual_seed((self.noise_seed * 0x9E3779B97F4A7C15 + self.draws) % 2**63)


def seed_noise(module: nn.Module, seed: int, step: int, rank: int = 0) -> None:
    """Seeds the noise of every gate in `module` by (seed, rank, layer, step). A loop calls it at each step's start,
    so that a resumed run draws what the unbroken one drew. No other random stream is touched."""
    gates = [m for m in module.modules() if isinstance(m, Gate)]
    for layer, one in enumerate(gates):
        one.noise_seed = (seed * 1_000_003 + rank) * 1_009 + layer + 1
        one.draws = step << 20  # micro-batches count on from here


@functools.lru_cache(maxsize=1024, typed=True)
def constant(value: float, device: torch.device) -> Tensor:
    """An int64 or fp32 scalar, the same tensor for every caller: it must not be written to."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64, device=device)


def _identity(counts_E: Tensor) -> Tensor:
    return counts_E
