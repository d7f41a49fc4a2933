"""What the whole decoder means in training: fp64 and plain loops over heads and tokens, one process, no ranks.

A capacity counts the tokens of one rank, so the oracle is told which tokens each rank holds.
"""

# Shapes: B batch, S sequence, T = B * S tokens, D model, d head width.

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import oracle
import torch
from torch import Tensor

from coterie.models.config import ModelConfig


class Losses(NamedTuple):
    """Sums over the whole batch."""

    lm: Tensor
    aux: Tensor
    z: Tensor


def losses(
    p: dict[str, Tensor],
    config: ModelConfig,
    tokens_BS: Tensor,
    targets_BS: Tensor,
    valid_BS: Tensor,
    ranks: list[list[int]] | None = None,
) -> Losses:
    """`p`: named as the parameters of `GPT`, fp64. `ranks`: the tokens b * S + s that each rank holds, in its order;
    None: one rank holds all."""
    B, S = tokens_BS.shape
    ranks = ranks or [list(range(B * S))]
    aux = z = torch.zeros((), dtype=torch.float64)
    routes: list[list[oracle.Route]] = []
    x_BSD = p["embed.weight"][tokens_BS]
    if config.positions == "learned":
        x_BSD = x_BSD + p["positions.weight"][:S]
    for layer in range(config.layers):
        own = {name.split(".", 2)[2]: value for name, value in p.items() if name.startswith(f"blocks.{layer}.")}
        h_BSD = _norm(own, "attention_norm", x_BSD, config)
        x_BSD = x_BSD + torch.stack([_attention(own, h_SD, config) for h_SD in h_BSD])
        h_TD = _norm(own, "mlp_norm", x_BSD, config).flatten(0, 1)
        if config.experts_of(layer):
            y_TD, routed = _moe(own, h_TD, config, valid_BS, ranks)
            aux, z = sum((one.aux for one in routed), aux), sum((one.z for one in routed), z)
            routes.append(routed)
        else:
            mlp = [own.get(f"mlp.{name}") for name in ("w_in", "w_out", "b_in", "b_out")]
            y_TD = torch.stack([oracle.feed_forward(h_D, *mlp, config.activation) for h_D in h_TD])  # type: ignore[arg-type]
        x_BSD = x_BSD + y_TD.view_as(x_BSD)
    if config.moe.gate.aux_over == "model":
        aux = sum((oracle.model_aux(list(layers), config.moe.top_k) for layers in zip(*routes, strict=True)), aux)
    head_VD = p["embed.weight"] if config.tied_head else p["head.weight"]
    logits_TV = (_norm(p, "final_norm", x_BSD, config) @ head_VD.T).flatten(0, 1)
    rows = [(t, y) for t, y in enumerate(targets_BS.flatten().tolist()) if y >= 0]
    lm = sum((logits_TV[t].exp().sum().log() - logits_TV[t, y] for t, y in rows), aux * 0)
    return Losses(lm, aux, z)


def _norm(p: dict[str, Tensor], name: str, x: Tensor, config: ModelConfig) -> Tensor:
    if config.norm == "layernorm" and f"{name}.bias" in p:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return x * p[f"{name}.weight"] + p.get(f"{name}.bias", 0)


def _attention(p: dict[str, Tensor], x_SD: Tensor, config: ModelConfig) -> Tensor:
    """Head by head: softmax(q k / sqrt(d)) v over the positions up to each."""
    S, width, shared = len(x_SD), config.width_per_head, config.heads // config.num_kv_heads
    later = torch.ones(S, S, dtype=torch.bool).triu(1)
    q_HSd = [_project(p, "q", x_SD, head) for head in range(config.heads)]
    k_GSd, v_GSd = ([_project(p, "kv", x_SD, i, group) for group in range(config.num_kv_heads)] for i in (0, 1))
    if config.qk_norm != "none":
        q_HSd, k_GSd = (_head_norm(p, f"attention.{n}_norm", x, config) for n, x in (("q", q_HSd), ("k", k_GSd)))
    answers = []
    for head in range(config.heads):
        group = head // shared
        q_Sd, k_Sd, v_Sd = q_HSd[head], k_GSd[group], v_GSd[group]
        if config.positions == "rotary":
            q_Sd, k_Sd = _rotate(q_Sd, config), _rotate(k_Sd, config)
        scores_SS = (q_Sd @ k_Sd.T / math.sqrt(width)).masked_fill(later, -math.inf)
        answers.append(scores_SS.softmax(-1) @ v_Sd)
    return torch.cat(answers, 1) @ p["attention.out.weight"].T + p.get("attention.out_bias", 0)


def _project(p: dict[str, Tensor], name: str, x_SD: Tensor, *place: int) -> Tensor:
    bias = p[f"attention.{name}.bias"][place] if f"attention.{name}.bias" in p else 0
    return x_SD @ p[f"attention.{name}.weight"][place].T + bias


def _head_norm(p: dict[str, Tensor], name: str, x_HSd: list[Tensor], config: ModelConfig) -> list[Tensor]:
    """Each head by itself, or all of them side by side."""
    if config.qk_norm == "head":
        return [_norm(p, name, x_Sd, config) for x_Sd in x_HSd]
    return list(_norm(p, name, torch.cat(x_HSd, 1), config).chunk(len(x_HSd), 1))


def _rotate(x_Sd: Tensor, config: ModelConfig) -> Tensor:
    """Pairs (i, i + d / 2) turned by s * theta^(-2 i / d) (arXiv 2104.09864, the half-split order)."""
    S, width = x_Sd.shape
    half = width // 2
    rates = torch.tensor(
        [_rate(config.rope_theta ** (-2 * i / width), config) for i in range(half)], dtype=torch.float64
    )
    angles_Sh = torch.arange(S, dtype=torch.float64)[:, None] * rates
    a, b = x_Sd[:, :half], x_Sd[:, half:]
    return torch.cat([a * angles_Sh.cos() - b * angles_Sh.sin(), b * angles_Sh.cos() + a * angles_Sh.sin()], 1)


def _rate(rate: float, config: ModelConfig) -> float:
    """Slowed down by wavelength: short ones stay, long ones are stretched, and between them both are mixed."""
    scaling = config.rope_scaling
    if scaling is None:
        return rate
    slow, wavelength = rate / scaling.factor, 2 * math.pi / rate
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.kind == "linear" or wavelength > scaling.original_max_positions / low:
        return slow
    if wavelength < scaling.original_max_positions / high:
        return rate
    share = (scaling.original_max_positions / wavelength - low) / (high - low)
    return (1 - share) * slow + share * rate


def _moe(
    p: dict[str, Tensor], x_TD: Tensor, config: ModelConfig, valid_BS: Tensor, ranks: list[list[int]]
) -> tuple[Tensor, list[oracle.Route]]:
    """Each rank routes and drops its own tokens; the global loss counts the assignments of all."""
    moe = replace(config.moe, hidden=config.expert_hidden)
    own = {name.removeprefix("moe."): value for name, value in p.items()}
    valid = valid_BS.flatten().tolist()

    def route(tokens: list[int], counts: list[int] | None) -> oracle.Route:
        return oracle.route(
            x_TD[tokens],
            own["gate.weight"],
            moe.top_k,
            moe.gate,
            valid=[valid[t] for t in tokens],
            sequence_length=valid_BS.shape[1],
            counts=counts,
        )

    asked = [sum(column) for column in zip(*(route(tokens, None).asked for tokens in ranks), strict=True)]
    y_TD = torch.zeros_like(x_TD)
    routes = [route(tokens, asked if moe.gate.aux_scope == "global" else None) for tokens in ranks]
    for tokens, routed in zip(ranks, routes, strict=True):
        y_TD = y_TD.index_add(0, torch.tensor(tokens), oracle.layer(own, x_TD[tokens], routed, moe))
    return y_TD, routes
