"""All that a MoE layer needs to know."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints


def _check_choices(config: Any) -> None:
    """Raises ValueError when a field that is one of several words holds another: it would quietly mean the last."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            known = ", ".join(get_args(hint))
            raise ValueError(f"{name}={getattr(config, name)!r} is not one of {known}")


@dataclass(frozen=True)
class GateConfig:
    """How a router scores, chooses, drops and balances."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: Literal["none", "before_drop", "after_drop"] = "before_drop"
    """Divide the chosen weights by their sum: over the k choices (Megatron, HF), or over the choices that
    survive the capacity (DeepSpeed top-2), or not at all (Switch, OLMoE). top_k=1 is never renormalised."""
    noise: Literal["none", "jitter", "gumbel"] = "none"
    """Training only. jitter: router input times U(1-eps, 1+eps); gumbel: choose by logits + Gumbel(0, 1), weights
    stay those of the clean scores (DeepSpeed RSample)."""
    jitter_eps: float = 1e-2
    second_expert: Literal["argmax", "sampled"] = "argmax"
    """sampled: the second of two experts is drawn with Gumbel noise (GShard; DeepSpeed top-2). Training only."""
    capacity_factor: float | None = None
    """None: dropless. Else an expert takes max(ceil(T * k / E * factor), min_capacity) rows (DeepSpeed)."""
    eval_capacity_factor: float | None = None
    """The same outside training; None: dropless."""
    min_capacity: int = 4
    drop_policy: Literal["position", "probability", "random"] = "position"
    """Who stays when an expert is full: the earliest (first choices before second ones), the most probable,
    or a random subset (DeepSpeed RTS)."""
    groups: int = 1
    """Experts form this many groups of equal size; choices come from the best `topk_groups` of them
    (DeepSeek: a group's score is the sum of its best two)."""
    topk_groups: int = 1
    route_scale: float = 1.0
    aux_weight: float = 0.01
    """Weight of the load-balancing loss E * sum_i f_i P_i (Switch eq. 4): 1.0 at balance, summed over layers."""
    aux_scope: Literal["micro", "sequence", "global"] = "global"
    """Whose token fractions f_i: this micro-batch's on this rank, each sequence's own, or the global batch's."""
    aux_over: Literal["layer", "model"] = "layer"
    """layer: each MoE layer has its own loss, and they are summed. model: one loss over the tokens of all MoE layers
    together, k times as large: top_k at balance (Hugging Face's `load_balancing_loss_func`)."""
    z_weight: float = 0.0
    """Weight of the router z-loss, mean logsumexp(logits)^2 (ST-MoE eq. 5)."""
    bias_update: float = 0.0
    """Loss-free balancing: step u of the selection bias, b += u * sign(mean load - load), zero-mean; 0: none."""

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and factor <= 0:
                raise ValueError(f"{name} must be over 0 (or None for dropless), but {factor} was given")
        if not 1 <= self.topk_groups <= self.groups:
            raise ValueError(f"topk_groups={self.topk_groups} must lie in 1..groups={self.groups}")
        if self.aux_over == "model" and self.aux_scope == "sequence":
            raise ValueError("aux_over='model' has no loss per sequence: use aux_scope='micro' or 'global'")
        if self.noise == "jitter" and not 0 < self.jitter_eps < 1:
            raise ValueError(f"jitter_eps must lie between 0 and 1, but {self.jitter_eps} was given")
        if min(self.aux_weight, self.z_weight, self.bias_update, self.min_capacity) < 0:
            raise ValueError("aux_weight, z_weight, bias_update and min_capacity cannot be negative")
        if self.second_expert == "sampled" and self.groups > 1:
            raise ValueError("second_expert='sampled' does not go with expert groups")


@dataclass(frozen=True)
class MoEConfig:
    """One MoE layer. `num_experts` lives in the model's list, because a pyramid's layers differ."""

    top_k: int = 2
    hidden: int = 0
    """Width F of one expert; 0: the dense layers' width."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = False
    residual: bool = False
    """Residual-MoE (DeepSpeed-MoE section 4.1): an MLP beside the experts, mixed by softmax(Linear(D, 2))."""
    shared_hidden: int = 0
    """Width of a shared expert that every token visits; 0: none."""
    shared_gate: bool = False
    """Multiply the shared expert by sigmoid(Linear(D, 1)) (Qwen2-MoE)."""
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, but {self.top_k} was given")
        if self.hidden < 0 or self.shared_hidden < 0:
            raise ValueError("hidden and shared_hidden cannot be negative")
        if self.gate.second_expert == "sampled" and self.top_k != 2:
            raise ValueError(f"second_expert='sampled' needs top_k=2, but top_k={self.top_k}")
        if self.shared_gate and not self.shared_hidden:
            raise ValueError("shared_gate=True needs shared_hidden > 0")

    def check(self, num_experts: int) -> None:
        """Raises ValueError when a layer of `num_experts` experts cannot route like this."""
        if self.top_k > num_experts:
            raise ValueError(f"top_k={self.top_k} is more than the layer's {num_experts} experts")
        groups, best = self.gate.groups, self.gate.topk_groups
        if num_experts % groups:
            raise ValueError(f"{num_experts} experts do not form {groups} groups of equal size")
        if self.top_k > num_experts // groups * best:
            raise ValueError(
                f"top_k={self.top_k} is more than the {num_experts // groups * best} experts "
                f"of the best {best} of {groups} groups"
            )
