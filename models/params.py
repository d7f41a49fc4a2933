"""How many parameters a decoder has, and how much work a token is: from its config alone, without building it."""

from __future__ import annotations

from typing import NamedTuple

from .config import ModelConfig


class Count(NamedTuple):
    """Numbers of parameters."""

    total: int
    activated: int
    """Those that one token visits: of a MoE layer's experts only the top_k (before any drop)."""
    experts: int
    """Those inside routed experts."""
    embedding: int
    """Token and position embeddings, and the head when it is its own."""


def count_params(config: ModelConfig) -> Count:
    """Exact counts. A router has no bias (DeepSpeed); its loss-free balancing bias is a buffer, not a parameter.

    For GPT-2-like presets `total` is L(12h^2 + 13h) + Vh + Sh + per MoE layer [(E-1, or E beside a residual MLP)
    (8h^2 + 5h) + Eh, and 2h + 2 for the residual's mixing], as in DeepSpeed-MoE's table, and 2h for the final
    LayerNorm, which that formula leaves out.
    """
    dim = config.dim
    embedding = config.vocab_size * dim * (1 if config.tied_head else 2)
    embedding += config.max_positions * dim if config.positions == "learned" else 0
    norm = dim * (1 if config.norm == "rmsnorm" else 2)
    total = activated = embedding + norm
    experts = 0
    for layer in range(config.layers):
        rest, expert, number, visited = _layer(config, layer)
        experts += number * expert
        total += rest + 2 * norm + number * expert
        activated += rest + 2 * norm + visited * expert
    return Count(total, activated, experts, embedding)


def flops_per_token(config: ModelConfig, sequence: int) -> int:
    """Floating-point operations of one training token, forward and backward, at this sequence length.

    6 per activated parameter that multiplies a token (the head does, an embedding look-up does not), and
    6 * heads * d * sequence per layer for causal attention's two products (half of a full square).
    """
    count = count_params(config)
    matrices = count.activated - count.embedding + config.vocab_size * config.dim
    attention = config.layers * config.heads * config.width_per_head * sequence
    return 6 * (matrices + attention)


def _layer(config: ModelConfig, layer: int) -> tuple[int, int, int, int]:
    """(parameters outside routed experts and norms, of one expert, number of experts, experts a token visits)."""
    moe, number = config.moe, config.experts_of(layer)
    rest = attention_params(config)
    if not number:
        return rest + feed_forward_params(config.dim, config.hidden, config.activation, config.mlp_bias), 0, 0, 0
    expert = feed_forward_params(config.dim, config.expert_hidden, moe.activation, moe.bias)
    rest += number * config.dim
    if moe.residual:
        rest += expert + 2 * config.dim + 2
    if moe.shared_hidden:
        rest += feed_forward_params(config.dim, moe.shared_hidden, moe.activation, moe.bias)
        rest += config.dim if moe.shared_gate else 0
    return rest, expert, number, moe.top_k


def attention_params(config: ModelConfig) -> int:
    """Of one layer's projections, their biases and the norms of queries and keys."""
    width, heads = config.width_per_head, config.heads
    rows = (heads + 2 * config.num_kv_heads) * width
    count = rows * config.dim + heads * width * config.dim
    count += {"none": 0, "qkv": rows, "all": rows + config.dim}[config.attention_bias]
    return count + {"none": 0, "head": 2, "all": heads + config.num_kv_heads}[config.qk_norm] * width


def feed_forward_params(dim: int, hidden: int, activation: str, bias: bool) -> int:
    """Of a dense feed-forward layer, or of one expert."""
    rows = 2 * hidden if activation == "swiglu" else hidden
    return rows * dim + hidden * dim + (rows + dim if bias else 0)
