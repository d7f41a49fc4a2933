"""Writes DeepSpeed-MoE checkpoints file by file, as Megatron-DeepSpeed does, from a model of ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.moe.config import GateConfig, MoEConfig

CONFIG = ModelConfig(
    vocab_size=32,
    max_positions=16,
    layers=4,
    dim=24,
    heads=4,
    hidden=40,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    attention_bias="all",
    mlp_bias=True,
    experts=(0, 4, 0, 2),
    moe=MoEConfig(top_k=1, hidden=40, activation="gelu", bias=True, gate=GateConfig(renormalize="none")),
)
TOP2 = replace(CONFIG, moe=replace(CONFIG.moe, top_k=2, gate=GateConfig(renormalize="after_drop")))
MODELS = {
    "top1": CONFIG,
    "top2": TOP2,
    "residual": replace(CONFIG, moe=replace(CONFIG.moe, residual=True)),
    "swiglu": replace(
        TOP2,
        norm="rmsnorm",
        positions="rotary",
        activation="swiglu",
        attention_bias="none",
        mlp_bias=False,
        tied_head=False,
        kv_heads=2,
        moe=replace(TOP2.moe, activation="swiglu", bias=False, residual=True),
    ),
    "dense": replace(CONFIG, experts=(), moe=MoEConfig()),
    "sparse": replace(TOP2, experts=(4, 4, 2, 2)),
}


def small_model(config: ModelConfig) -> GPT:
    torch.manual_seed(3)
    model = GPT(config)
    model.init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, and norms that are not all ones
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def arguments(config: ModelConfig) -> argparse.Namespace:
    return argparse.Namespace(
        num_attention_heads=config.heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        use_rotary_position_embeddings=config.positions == "rotary",
        rotary_percent=1.0,
        layernorm_epsilon=config.norm_eps,
        topk=config.moe.top_k,
        bias_gelu_fusion=config.activation == "gelu",
        moe_token_dropping=True,
        moe_train_capacity_factor=1.25,
        params_dtype=torch.float32,
        lr=1e-4,
    )


def _qkv(q: Tensor, kv: Tensor, order: str) -> Tensor:
    """Rows of one rank's query_key_value from (H, d, ...) and (2, G, d, ...)."""
    rows = []
    if order == "grouped":
        share = len(q) // kv.shape[1]
        for g in range(kv.shape[1]):
            rows += [*q[g * share : (g + 1) * share], kv[0, g], kv[1, g]]
        return torch.cat(rows)
    if order == "last":
        for h in range(len(q)):
            for i in range(q.shape[1]):
                rows += [q[h, i], kv[0, h, i], kv[1, h, i]]
        return torch.stack(rows)
    return torch.cat([*q, *kv[0], *kv[1]])


def _mlp(
    state: dict[str, Tensor], ours: str, theirs: str, rank: int, tp: int, at: int | None = None
) -> dict[str, Tensor]:
    """One feed-forward layer, or expert `at` of a stack, as rank `rank` of `tp` holds it."""
    found = {}
    for kind, name in {"w_in": "dense_h_to_4h.weight", "b_in": "dense_h_to_4h.bias"}.items():
        if f"{ours}.{kind}" in state:
            whole = state[f"{ours}.{kind}"] if at is None else state[f"{ours}.{kind}"][at]
            found[f"{theirs}.{name}"] = torch.cat([part.chunk(tp)[rank] for part in whole])
    whole = state[f"{ours}.w_out"] if at is None else state[f"{ours}.w_out"][at]
    found[f"{theirs}.dense_4h_to_h.weight"] = whole.chunk(tp, 1)[rank]
    if f"{ours}.b_out" in state:
        whole = state[f"{ours}.b_out"] if at is None else state[f"{ours}.b_out"][at]
        found[f"{theirs}.dense_4h_to_h.bias"] = whole
    return found


def _layer(state: dict[str, Tensor], n: int, rank: int, tp: int, cut: bool, order: str) -> dict[str, Tensor]:
    ours, theirs, found = f"blocks.{n}", f"layers.{n}", {}
    for one, other in {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}.items():
        found |= {f"{theirs}.{other}.{k}": state[f"{ours}.{one}.{k}"] for k in _kinds(state, f"{ours}.{one}")}
    for kind in _kinds(state, f"{ours}.attention.q"):
        q, kv = (
            state[f"{ours}.attention.q.{kind}"].chunk(tp)[rank],
            state[f"{ours}.attention.kv.{kind}"].chunk(tp, 1)[rank],
        )
        found[f"{theirs}.self_attention.query_key_value.{kind}"] = _qkv(q, kv, order)
    found[f"{theirs}.self_attention.dense.weight"] = state[f"{ours}.attention.out.weight"].chunk(tp, 1)[rank]
    if f"{ours}.attention.out_bias" in state:
        found[f"{theirs}.self_attention.dense.bias"] = state[f"{ours}.attention.out_bias"]
    if f"{ours}.moe.gate.weight" not in state:
        return found | _mlp(state, f"{ours}.mlp", f"{theirs}.mlp", rank, tp)
    found[f"{theirs}.mlp.deepspeed_moe.gate.wg.weight"] = state[f"{ours}.moe.gate.weight"]
    if f"{ours}.moe.coefficient.weight" in state:
        own = (rank, tp) if cut else (0, 1)
        found |= _mlp(state, f"{ours}.moe.residual", f"{theirs}.mlp.mlp", *own)
        found |= {f"{theirs}.mlp.coefficient.{k}": state[f"{ours}.moe.coefficient.{k}"] for k in ("weight", "bias")}
    return found


def _kinds(state: dict[str, Tensor], name: str) -> list[str]:
    return [kind for kind in ("weight", "bias") if f"{name}.{kind}" in state]


def write(
    folder: Path,
    model: GPT,
    tp: int = 1,
    cut: bool = False,
    order: str = "grouped",
    change: Callable[[dict[str, Any]], Any] = lambda data: None,
    **extra: Any,
) -> Path:
    """A checkpoint folder of a model: `cut` says whether experts are cut between the tensor-parallel ranks."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for rank in range(tp):
        embedding = {"word_embeddings": {"weight": state["embed.weight"].chunk(tp)[rank].clone()}}
        if "positions.weight" in state:
            embedding["position_embeddings"] = {"weight": state["positions.weight"]}
        encoder = {f"final_layernorm.{k}": state[f"final_norm.{k}"] for k in _kinds(state, "final_norm")}
        for n in range(model.config.layers):
            encoder |= _layer(state, n, rank, tp, cut, order)
        language_model: dict[str, Any] = {"embedding": embedding, "encoder": encoder}
        if "head.weight" in state:
            language_model["output_layer"] = {"weight": state["head.weight"].chunk(tp)[rank].clone()}
        data = {
            "module": {"language_model": language_model},
            "checkpoint_version": 3.0,
            "args": arguments(model.config),
        }
        data |= {"iteration": 7, "ds_version": "0.9", "rng_state": [{"random": (3, (1, 2), None)}], **extra}
        change(data)
        torch.save(data, step / f"mp_rank_{rank:02}_model_states.pt")
        moe_layer = 0
        for n, experts in enumerate(model.config.experts):
            for e in range(experts):
                name = f"language_model.encoder.layers.{n}.mlp.deepspeed_moe.experts.deepspeed_experts.{e}"
                own = (rank, tp) if cut else (0, 1)
                weights = {k: v.clone() for k, v in _mlp(state, f"blocks.{n}.moe.experts", name, *own, at=e).items()}
                torch.save(weights, step / f"layer_{moe_layer}_expert_{e}_mp_rank_{rank:02}_model_states.pt")
            moe_layer += experts > 0
        (step / f"expp_rank_{rank}_mp_rank_{rank:02}_optim_states.pt").write_bytes(b"not read")
    return folder
