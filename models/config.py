"""The shape of a decoder: all that a checkpoint's `config.json` must say."""

from dataclasses import dataclass, field
from typing import Literal

from ..moe.config import MoEConfig


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder; B batch, S sequence, D model, H heads, V vocabulary."""

    vocab_size: int = 50257
    max_positions: int = 2048
    layers: int = 12
    dim: int = 768
    heads: int = 12
    kv_heads: int = 0
    """0: as many as heads."""
    head_dim: int = 0
    """0: dim / heads."""
    hidden: int = 3072
    """Width of the dense feed-forward layers."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    qk_norm: bool = False
    bias: bool = False
    """Biases in attention and feed-forward projections."""
    tied_head: bool = True
    init_std: float = 0.02
    experts: tuple[int, ...] = ()
    """Experts of each layer, 0 for a dense one; (): all dense. `moe.pyramid.pyramid` writes PR-MoE's lists."""
    moe: MoEConfig = field(default_factory=MoEConfig)
