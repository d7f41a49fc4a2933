"""Keeping experts equally busy: the load-balancing loss, the router z-loss, and the loss-free bias."""

# Shapes: T tokens, E experts, K choices, B sequences, S tokens of a sequence.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def fractions(counts: Tensor) -> Tensor:
    """Share of the assignments that each expert got, over the last axis; zeros where there were none. fp32."""
    return counts.float() / counts.sum(-1, keepdim=True).clamp(min=1)


def balance_loss(probs_TE: Tensor, fraction_E: Tensor) -> Tensor:
    """E * sum_i f_i * sum_t p_ti: the token SUM of the load-balancing loss (Switch Transformer, eq. 4).

    One token's share is 1.0 at perfect balance, for any k, because f_i is the share of the k * T assignments
    before any drop. The gradient flows through p alone. Divided by the tokens this is DeepSpeed's `l_aux` (whose
    top-2 counts first choices only), Megatron's without its coefficient, and OLMo's. MegaBlocks' is divided by the
    layers; for HF's see `model_balance_loss`.

    Args:
        probs_TE: scores that sum to one per token; zero rows for padding.
        fraction_E: each expert's share of the assignments in the chosen scope.
    """
    return probs_TE.shape[-1] * torch.dot(probs_TE.sum(0), fraction_E)


class Balance(NamedTuple):
    """What one layer brings to a loss over all layers."""

    counts_E: Tensor
    """int64: assignments before drops in the loss's scope."""
    probs_E: Tensor
    """fp32: this rank's tokens' scores, those of a token adding up to one, summed; with a gradient."""


def model_balance_loss(layers: Sequence[Balance], top_k: int) -> Tensor:
    """Token SUM of Hugging Face's `load_balancing_loss_func`, where the tokens of all L layers are of one: T times
    E * sum_i (assignments_i / (L * T)) * (sum over layers and tokens of p_i / (L * T)), which is k at balance.

    Not the mean over layers of k * `balance_loss`: one layer may ask much of the experts that another spares.
    """
    counts_E = torch.stack([layer.counts_E for layer in layers]).sum(0)
    probs_E = torch.stack([layer.probs_E for layer in layers]).sum(0)
    return len(probs_E) * top_k / len(layers) * torch.dot(probs_E, fractions(counts_E))


def sequence_balance_loss(
    probs_TE: Tensor, choices_TK: Tensor, sequence_length: int, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The same with each sequence's own fractions (DeepSeek-V3, eq. 17-20): sum over sequences of
    E * sum_i f_i^b * sum_{t in b} p_ti. It depends neither on the micro-batch nor on the ranks.

    `sequence_length` is that of this rank; `reduce` sums the counts (B, E) over the ranks that hold the rest.
    """
    probs_BSE = probs_TE.unflatten(0, (-1, sequence_length))
    counts_BE = sequence_counts(choices_TK, sequence_length, probs_TE.shape[-1])
    fraction_BE = fractions(counts_BE if reduce is None else reduce(counts_BE))
    return probs_TE.shape[-1] * (probs_BSE.sum(1) * fraction_BE).sum()


def sequence_counts(choices_TK: Tensor, sequence_length: int, num_experts: int) -> Tensor:
    """Assignments per sequence and expert, (B, E) int64; choices of -1 are not counted."""
    slots_BA = choices_TK.reshape(-1, sequence_length * choices_TK.shape[1]) + 1  # column 0 takes the padding
    counts_BE = slots_BA.new_zeros(slots_BA.shape[0], num_experts + 1)
    return counts_BE.scatter_add_(1, slots_BA, torch.ones_like(slots_BA))[:, 1:]


def z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Token SUM of logsumexp(logits)^2 over the valid tokens (ST-MoE, eq. 5). fp32."""
    squares_T = logits_TE.logsumexp(-1).square()
    return (squares_T if valid_T is None else squares_T.where(valid_T, 0)).sum()


@torch.no_grad()
def update_bias(bias_E: Tensor, counts_E: Tensor, speed: float) -> None:
    """Loss-free balancing, in place: b += speed * sign(mean load - load), less the mean of that step.

    `counts_E` are the assignments of the whole global batch. Megatron leaves the step's mean in (arXiv 2408.15664);
    torchtitan subtracts it, as here, so that the biases cannot drift. Only differences of biases choose experts.
    """
    load_E = counts_E.to(torch.float64)
    step_E = torch.sign(load_E.mean() - load_E)
    bias_E += (speed * (step_E - step_E.mean())).to(bias_E.dtype)
