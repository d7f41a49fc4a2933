"""The shape of a decoder: all that a checkpoint's `config.json` must say."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..moe.config import MoEConfig

_CHOICES = {"activation": ("swiglu", "gelu"), "norm": ("rmsnorm", "layernorm"), "positions": ("rotary", "learned")}


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder; B batch, S sequence, D model, H heads, V vocabulary.

    Raises:
        ValueError: sizes that do not fit together.
    """

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
    """RMSNorm of every query and key head before the rotation (Qwen3)."""
    bias: bool = False
    """Biases in attention and feed-forward projections."""
    tied_head: bool = True
    init_std: float = 0.02
    """Of every matrix; output projections of a block take init_std / sqrt(2 * layers) (GPT-2)."""
    experts: tuple[int, ...] = ()
    """Experts of each layer, 0 for a dense one; (): all dense. `moe.pyramid.pyramid` writes PR-MoE's lists."""
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        self._check_ranges()
        if not self.head_dim and self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not split into {self.heads} heads: change one, or give head_dim")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.num_kv_heads} kv_heads evenly")
        if self.positions == "rotary" and self.width_per_head % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.width_per_head}")
        if self.experts and len(self.experts) != self.layers:
            raise ValueError(f"experts lists {len(self.experts)} layers, but the model has {self.layers}")
        for count in set(self.experts) - {0}:
            self.moe.check(count)

    def _check_ranges(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:  # it would quietly mean the other one
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}: choose one of them"
                )
        for name in ("vocab_size", "max_positions", "layers", "dim", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, but {getattr(self, name)} was given")
        for name in ("kv_heads", "head_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (take the default) or more, but {getattr(self, name)} was given")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number over 0, but {getattr(self, name)} was given")
        if any(count < 0 for count in self.experts):
            raise ValueError(f"experts cannot be negative, but {list(self.experts)} was given")

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, G."""
        return self.kv_heads or self.heads

    @property
    def width_per_head(self) -> int:
        """Width of one head, d."""
        return self.head_dim or self.dim // self.heads

    @property
    def expert_hidden(self) -> int:
        """Width F of one expert."""
        return self.moe.hidden or self.hidden

    def experts_of(self, layer: int) -> int:
        """Experts of one layer; 0: it is dense."""
        return self.experts[layer] if self.experts else 0
