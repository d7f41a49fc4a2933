"""What a MoE layer means: fp64 and plain loops over tokens and experts, differentiated by autograd.

Every gate option, drop, loss and statistic is spelled out here once, in the most literal way there is. Tests hold the
package's layers, dispatchers and layouts against it: outputs, all gradients, losses, drop decisions, counts.
"""

# Shapes: B batch, S sequence, T = B * S tokens, D model, E experts, K choices, F hidden.

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coterie.moe.config import GateConfig, MoEConfig


class Noise(NamedTuple):
    """Random numbers that the gate drew, in the order in which it draws them."""

    jitter_TD: Tensor | None = None  # uniform in [0, 1)
    exponential_TE: Tensor | None = None  # -log of it is Gumbel(0, 1)
    order_A: Tensor | None = None  # uniform in [0, 1), of assignment t * K + k


class Route(NamedTuple):
    """One rank's routing. `weights[t]` holds (expert, weight) of the kept choices of token t."""

    choices: list[list[int]]  # [] for padding
    kept: list[list[int]]  # -1 where dropped
    weights: list[list[tuple[int, Tensor]]]
    aux: Tensor
    z: Tensor
    entropy: Tensor
    asked: list[int]
    kept_counts: list[int]
    tokens: int
    counts: list[int]  # assignments in the loss's scope
    probs: list[Tensor]  # per expert, over the valid tokens


def draw(config: GateConfig, T: int, D: int, E: int, K: int, generator: torch.Generator) -> Noise:
    """The noise of a training forward."""
    jitter = torch.rand(T, D, generator=generator) if config.noise == "jitter" else None
    gumbel = config.noise == "gumbel" or config.second_expert == "sampled"
    exponential = torch.empty(T, E).exponential_(generator=generator) if gumbel else None
    drops = config.drop_policy == "random" and config.capacity_factor is not None
    order = torch.rand(T * K, generator=generator) if drops else None
    return Noise(*(None if n is None else n.double() for n in (jitter, exponential, order)))


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """fp64 copies of a module's parameters, ready for gradients."""
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    top_k: int,
    config: GateConfig,
    *,
    valid: list[bool] | None = None,
    bias: list[float] | None = None,
    training: bool = True,
    sequence_length: int | None = None,
    replay: list[list[int]] | None = None,
    counts: list[int] | None = None,
    noise: Noise | None = None,
) -> Route:
    """Routes the tokens of one rank. `counts`: the global batch's assignments, for the global scope."""
    T, E = len(x_TD), len(weight_ED)
    noise = noise or Noise()
    valid = [True] * T if valid is None else valid
    z = entropy = torch.zeros((), dtype=torch.float64)
    scores: list[list[Tensor]] = []
    choices: list[list[int]] = []
    for t in range(T):
        x_D = x_TD[t]
        if noise.jitter_TD is not None:
            x_D = x_D * (1 - config.jitter_eps + 2 * config.jitter_eps * noise.jitter_TD[t])
        logits = [(x_D * weight_ED[e]).sum() for e in range(E)]
        scores.append(_scores(logits, config.score))
        if not valid[t]:
            choices.append([])
            continue
        z = z + sum(v.exp() for v in logits).log() ** 2
        entropy = entropy - sum(p * p.log() for p in _normal(scores[t])) / math.log(E)
        row = None if noise.exponential_TE is None else noise.exponential_TE[t]
        choices.append(replay[t] if replay is not None else _choose(logits, top_k, config, bias, row))
    asked = [sum(e in chosen for chosen in choices) for e in range(E)]
    kept = _drop(scores, choices, E, top_k, config, training, noise)
    weights = [_weigh(scores[t], choices[t], kept[t], top_k, config) for t in range(T)]
    counts = asked if counts is None else counts
    aux = _aux(scores, choices, valid, counts, config, sequence_length)
    probs = [sum((_normal(scores[t])[e] for t in range(T) if valid[t]), z * 0) for e in range(E)]
    kept_counts = [sum(e in ids for ids in kept) for e in range(E)]
    return Route(choices, kept, weights, aux, z, entropy, asked, kept_counts, sum(valid), counts, probs)


def _scores(logits: list[Tensor], score: str) -> list[Tensor]:
    if score == "softmax":
        total = sum(v.exp() for v in logits)
        return [v.exp() / total for v in logits]
    return [1 / (1 + (-v).exp()) for v in logits]


def _normal(scores: list[Tensor]) -> list[Tensor]:
    return [s / sum(scores) for s in scores]


def _choose(
    logits: list[Tensor], top_k: int, config: GateConfig, bias: list[float] | None, exponential_E: Tensor | None
) -> list[int]:
    clean = _best(logits, top_k, config, bias)
    if exponential_E is None:
        return clean
    noisy = _best([v - exponential_E[e].log() for e, v in enumerate(logits)], len(logits), config, bias)
    if config.noise == "gumbel":
        return noisy[:top_k]
    return [clean[0], next(e for e in noisy if e != clean[0])]


def _best(logits: list[Tensor], top_k: int, config: GateConfig, bias: list[float] | None) -> list[int]:
    select = [s.item() + (bias[e] if bias else 0.0) for e, s in enumerate(_scores(logits, config.score))]
    members = len(select) // config.groups
    groups = [range(g * members, (g + 1) * members) for g in range(config.groups)]
    strength = [sum(sorted((select[e] for e in group), reverse=True)[:2]) for group in groups]
    chosen = sorted(range(config.groups), key=lambda g: (-strength[g], g))[: config.topk_groups]
    open_experts = [e for g in chosen for e in groups[g]]
    return sorted(open_experts, key=lambda e: (-select[e], e))[:top_k]


def _drop(
    scores: list[list[Tensor]],
    choices: list[list[int]],
    E: int,
    top_k: int,
    config: GateConfig,
    training: bool,
    noise: Noise,
) -> list[list[int]]:
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor is None:
        return [list(c) for c in choices]
    tokens = sum(bool(c) for c in choices)
    capacity = max(math.ceil(round(tokens * top_k / E * factor, 6)), config.min_capacity)
    kept = [[-1] * len(c) for c in choices]
    for e in range(E):
        queue = [(t, k) for t, chosen in enumerate(choices) for k, c in enumerate(chosen) if c == e]
        if config.drop_policy == "position":
            queue.sort(key=lambda tk: (tk[1], tk[0]))
        elif config.drop_policy == "probability":
            queue.sort(key=lambda tk: (-scores[tk[0]][e].item(), tk[0]))
        else:
            order_A = noise.order_A
            assert order_A is not None
            queue.sort(key=lambda tk: order_A[tk[0] * top_k + tk[1]].item())
        for t, k in queue[:capacity]:
            kept[t][k] = e
    return kept


def _weigh(
    scores: list[Tensor], chosen: list[int], kept: list[int], top_k: int, config: GateConfig
) -> list[tuple[int, Tensor]]:
    stay = [e for e in kept if e >= 0]
    scale = {"none": [], "before_drop": chosen, "after_drop": stay}[config.renormalize if top_k > 1 else "none"]
    total = sum(scores[e] for e in scale) if scale else 1
    return [(e, scores[e] / total * config.route_scale) for e in stay]


def _aux(
    scores: list[list[Tensor]],
    choices: list[list[int]],
    valid: list[bool],
    counts: list[int],
    config: GateConfig,
    sequence_length: int | None,
) -> Tensor:
    T, E = len(scores), len(counts)
    aux = torch.zeros((), dtype=torch.float64)
    if config.aux_over == "model":
        return aux
    span = sequence_length if config.aux_scope == "sequence" and sequence_length else T
    for first in range(0, T, max(span, 1)):
        inside = range(first, first + span)
        if config.aux_scope == "sequence":
            counts = [sum(e in choices[t] for t in inside) for e in range(E)]
        for t in inside:
            if valid[t]:
                p = _normal(scores[t])
                aux = aux + E * sum(counts[e] / sum(counts) * p[e] for e in range(E))
    return aux


def model_aux(layers: list[Route], top_k: int) -> Tensor:
    """Of one rank's tokens: all layers make one batch, in which an expert's number means the same in each."""
    L, E = len(layers), len(layers[0].counts)
    rows = sum(sum(one.counts) for one in layers) / top_k  # of all layers, in the loss's scope
    aux = torch.zeros((), dtype=torch.float64)
    for e in range(E):
        share = sum(one.counts[e] for one in layers) / max(rows, 1)
        aux = aux + E * share * sum(one.probs[e] for one in layers) / L
    return aux


def feed_forward(
    x_D: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None, kind: str
) -> Tensor:
    """One network on one token."""
    z = w_in @ x_D + (0 if b_in is None else b_in)
    if kind == "swiglu":
        gate, up = z
        a = gate / (1 + (-gate).exp()) * up
    else:
        (z,) = z
        a = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return w_out @ a + (0 if b_out is None else b_out)


def layer(p: dict[str, Tensor], x_TD: Tensor, routed: Route, config: MoEConfig) -> Tensor:
    """The MoE layer's answer for routed tokens; `p` is named as the parameters of `MoE`."""
    rows = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for e, weight in routed.weights[t]:
            own = [None if (w := p.get(f"experts.{name}")) is None else w[e] for name in ("b_in", "b_out")]
            y_D = y_D + weight * feed_forward(
                x_D, p["experts.w_in"][e], p["experts.w_out"][e], *own, config.activation
            )
        if config.residual:
            c = p["coefficient.weight"] @ x_D + p["coefficient.bias"]
            c = c.exp() / c.exp().sum()
            y_D = c[0] * y_D + c[1] * _beside(p, "residual", x_D, config)
        if config.shared_hidden:
            shared_D = _beside(p, "shared", x_D, config)
            if config.shared_gate:
                shared_D = shared_D / (1 + (-(p["shared_gate.weight"][0] @ x_D)).exp())
            y_D = y_D + shared_D
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD.clone()


def _beside(p: dict[str, Tensor], name: str, x_D: Tensor, config: MoEConfig) -> Tensor:
    biases = p.get(f"{name}.b_in"), p.get(f"{name}.b_out")
    return feed_forward(x_D, p[f"{name}.w_in"], p[f"{name}.w_out"], *biases, config.activation)
