"""The shape of a decoder: all that a checkpoint's `config.json` must say."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..moe.config import MoEConfig

_CHOICES = {
    "activation": ("swiglu", "gelu"),
    "norm": ("rmsnorm", "layernorm"),
    "positions": ("rotary", "learned"),
    "qk_norm": ("none", "head", "all"),
    "attention_bias": ("none", "qkv", "all"),
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotations slowed down, for sequences longer than those that a model was first trained on.

    Raises:
        ValueError: a number out of its range.
    """

    kind: Literal["linear", "llama3"]
    """linear: every rate over `factor` (arXiv 2306.15595). llama3: rates whose wavelength, in positions, is over
    original_max_positions / low_freq_factor are divided, those under original_max_positions / high_freq_factor stay,
    and between the two the share that stays grows evenly with the turns in original_max_positions (Llama 3.1)."""
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    """This and the two above: llama3 alone."""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling.kind={self.kind!r} is not one of linear, llama3: choose one of them")
        for name, least in (("factor", 1), ("low_freq_factor", 0), ("original_max_positions", 1)):
            value = getattr(self, name)
            if not least <= value < math.inf or not value:
                raise ValueError(f"rope_scaling.{name} must be {least or 'over 0'}{' or more' * least}, not {value}")
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"rope_scaling.high_freq_factor must be over low_freq_factor={self.low_freq_factor}, "
                f"not {self.high_freq_factor}"
            )


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
    rope_scaling: RopeScaling | None = None
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMSNorm of queries and keys before the rotation: head: of every head by itself, with one weight (d,) (Qwen3);
    all: over the widths of all heads together, with a weight (H * d,) for queries and (G * d,) for keys (OLMoE)."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Biases of queries, keys and values (Qwen2); all: of the output projection too (GPT-2)."""
    mlp_bias: bool = False
    """Biases in dense feed-forward layers; experts have `moe.bias`."""
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
        counts = sorted(set(self.experts) - {0})
        for count in counts:
            self.moe.check(count)
        if self.moe.gate.aux_over == "model" and len(counts) > 1:
            raise ValueError(
                f"aux_over='model' needs as many experts in every MoE layer, not {', '.join(map(str, counts))}: "
                "use aux_over='layer'"
            )
        if self.rope_scaling is not None and self.positions != "rotary":
            raise ValueError(f"rope_scaling needs positions='rotary', not {self.positions!r}: change one of them")

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
