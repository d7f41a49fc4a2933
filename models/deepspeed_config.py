"""The config of a Megatron-DeepSpeed GPT: what its tensors' shapes tell, and of its arguments what they cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..moe.config import GateConfig, MoEConfig
from .config import ModelConfig

LAYER = "encoder.layers."
GATE = "mlp.deepspeed_moe.gate.wg.weight"
EXPERT = "mlp.deepspeed_moe.experts.deepspeed_experts."

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Hints:
    """What a checkpoint may not say of itself; None: take it from the stored arguments."""

    heads: int | None = None
    kv_heads: int | None = None
    top_k: int | None = None
    qkv: Literal["grouped", "split", "last"] | None = None
    """Rows of query_key_value: a group of query heads, their key and their value, group by group; all queries, all
    keys, all values; or (q, k, v) of each row of a head side by side (checkpoint_version 1)."""
    tanh_gelu: bool = False
    """Take gelu's tanh form for the exact one, which coterie does not have: they differ by 5e-4 at most."""


def config_of(shapes: Shapes, args: Mapping[str, Any] | None, hints: Hints) -> ModelConfig:
    """The config of a checkpoint.

    Args:
        shapes: of its whole tensors, tensor-parallel parts put together, by `deepspeed`'s names.
        args: its arguments.
        hints: come before those.

    Raises:
        ValueError: what is missing, does not fit or is not known to coterie: all in one message.
    """
    problems: list[str] = []
    told = _Arguments(args, problems)
    _refuse_lacking(told, problems)
    values = _attention(shapes, told, hints, problems) | _blocks(shapes, told, hints, problems)
    layers, experts = values["layers"], values["experts"]
    if any(experts):
        values["moe"] = _moe(shapes, experts, told, hints, problems)
    if problems:
        raise ValueError("the DeepSpeed checkpoint: " + "; ".join(problems))
    assert layers > 0
    return ModelConfig(**values)


class _Arguments:
    """Stored arguments, asked by name and type."""

    def __init__(self, args: Mapping[str, Any] | None, problems: list[str]) -> None:
        self._args, self._problems = args or {}, problems

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._args.get(name)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self._problems.append(f"its argument {name} is {value!r}, expected {kind.__name__}")
            return default
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._args


def _refuse_lacking(told: _Arguments, problems: list[str]) -> None:
    for name, what in {
        "apply_residual_connection_post_layernorm": "residuals that start after the norm",
        "apply_layernorm_1p": "norms with a weight of 1 + w",
        "squared_relu": "squared ReLU",
        "retro_add_retriever": "a retriever",
        "add_retriever": "a retriever",
        "use_alibi_position_embeddings": "ALiBi",
    }.items():
        if told.get(name, bool, False):
            problems.append(f"it has {what} ({name}), which coterie lacks")
    if told.get("rotary_percent", float, 1.0) != 1.0:
        problems.append("it rotates a part of each head (rotary_percent), which coterie lacks")


def _attention(shapes: Shapes, told: _Arguments, hints: Hints, problems: list[str]) -> dict[str, Any]:
    first = f"{LAYER}0.self_attention.query_key_value"
    words = shapes.get("embedding.word_embeddings.weight", ())
    rows = shapes.get(f"{first}.weight", ())
    if len(words) != 2 or len(rows) != 2:
        problems.append(f"it lacks embedding.word_embeddings or {first}: it is no GPT of Megatron-DeepSpeed")
        return {"vocab_size": 1, "dim": 1, "heads": 1}
    heads = hints.heads or told.get("num_attention_heads", int)
    if not heads or heads < 0:
        problems.append("it does not say how many attention heads it has: give heads")
        heads = 1
    kv_heads = hints.kv_heads or told.get("num_key_value_heads", int) or heads
    width, rest = divmod(rows[0], heads + 2 * kv_heads)
    if rest or kv_heads < 1:
        problems.append(f"{rows[0]} rows of query_key_value do not split into {heads} heads and {kv_heads} kv_heads")
    learned = shapes.get("embedding.position_embeddings.weight")
    positions = learned[0] if learned else told.get("max_position_embeddings", int)
    if learned is None and not told.get("use_rotary_position_embeddings", bool, False):
        problems.append("it has neither position_embeddings nor use_rotary_position_embeddings")
    return {
        "vocab_size": words[0],
        "dim": words[1],
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "head_dim": 0 if width * heads == words[1] else width,
        "max_positions": positions or 1,
        "positions": "rotary" if learned is None else "learned",
        "rope_theta": told.get("rope_theta", float, 10000.0),
        "attention_bias": "all" if f"{first}.bias" in shapes else "none",
    }


def _blocks(shapes: Shapes, told: _Arguments, hints: Hints, problems: list[str]) -> dict[str, Any]:
    found = {int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(LAYER)}(\d+)\.", name))}
    layers = len(found)
    if not found or max(found) != layers - 1:
        problems.append(f"its layers {sorted(found)[:9]} do not count from 0 on")
        layers = 1
    experts = tuple(shapes.get(f"{LAYER}{i}.{GATE}", (0,))[0] for i in range(layers))
    dense = [f"{LAYER}{i}.mlp" for i in range(layers) if not experts[i]]
    sparse = [f"{LAYER}{i}.{EXPERT}0" for i in range(layers) if experts[i]]
    wide, narrow = (_width(shapes, names[0], problems) if names else ("gelu", 0) for names in (dense, sparse))
    _check_gelu((wide if dense else narrow)[0], told, hints, problems)
    return {
        "layers": layers,
        "experts": experts if any(experts) else (),
        "hidden": wide[1] or narrow[1] or 1,
        "activation": (wide if dense else narrow)[0],
        "mlp_bias": bool(dense) and f"{dense[0]}.dense_h_to_4h.bias" in shapes,
        "norm": "layernorm" if f"{LAYER}0.input_layernorm.bias" in shapes else "rmsnorm",
        "norm_eps": told.get("layernorm_epsilon", float, 1e-5),
        "tied_head": "output_layer.weight" not in shapes,
        "init_std": told.get("init_method_std", float, ModelConfig().init_std),
    }


def _width(shapes: Shapes, mlp: str, problems: list[str]) -> tuple[str, int]:
    """Activation and width F of a feed-forward layer: swiglu has two rows for each column."""
    into, out = shapes.get(f"{mlp}.dense_h_to_4h.weight", ()), shapes.get(f"{mlp}.dense_4h_to_h.weight", ())
    if len(into) != 2 or len(out) != 2 or into[0] not in (out[1], 2 * out[1]):
        problems.append(f"{mlp} has no weights dense_h_to_4h and dense_4h_to_h that fit each other")
        return "gelu", 1
    return ("gelu" if into[0] == out[1] else "swiglu"), out[1]


def _check_gelu(activation: str, told: _Arguments, hints: Hints, problems: list[str]) -> None:
    tanh = told.get("bias_gelu_fusion", bool, True) or told.get("openai_gelu", bool, False) or hints.tanh_gelu
    if activation == "gelu" and not tanh:
        problems.append("it has the exact gelu, coterie the tanh form, 5e-4 apart at most: allow that with tanh_gelu")


def _moe(
    shapes: Shapes, experts: tuple[int, ...], told: _Arguments, hints: Hints, problems: list[str]
) -> MoEConfig | None:
    layer = next(i for i, count in enumerate(experts) if count)
    activation, hidden = _width(shapes, f"{LAYER}{layer}.{EXPERT}0", problems)
    top_k = hints.top_k or told.get("topk", int)
    if not top_k:
        problems.append("it does not say how many experts a token visits: give top_k")
        return None
    drops = told.get("moe_token_dropping", bool, True)
    gate = GateConfig(
        renormalize="none" if top_k == 1 else "after_drop",
        second_expert="sampled" if top_k == 2 and told.get("moe_top2_2nd_expert_sampling", bool, True) else "argmax",
        capacity_factor=told.get("moe_train_capacity_factor", float, 1.0) if drops else None,
        min_capacity=told.get("moe_min_capacity", int, 4),
        drop_policy={1: "random", 2: "position"}.get(top_k, "probability"),  # type: ignore[arg-type]
        aux_weight=told.get("moe_loss_coeff", float, 0.1),
        aux_scope="micro",
    )
    return MoEConfig(
        top_k=top_k,
        hidden=hidden,
        activation=activation,  # type: ignore[arg-type]
        bias=f"{LAYER}{layer}.{EXPERT}0.dense_h_to_4h.bias" in shapes,
        residual=f"{LAYER}{layer}.mlp.coefficient.weight" in shapes,
        gate=gate,
    )
