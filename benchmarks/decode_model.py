"""A random model for measuring generation, whose routers prefer some experts as trained ones do.

Under a plain N(0, 0.02) every expert is visited alike and greedy text soon repeats itself. Here embeddings have unit
variance and a common part that each router sees, a router's rows have unlike lengths, and the head is wide enough
for one token to lead.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.config import ModelConfig
from ..models.gpt import GPT
from ..models.weights import save_model
from ..models.write import model_of, ordered, write
from ..moe.config import GateConfig, MoEConfig

# As transformers' Mixtral has them, so that it can open what is written.
_GATE = GateConfig(aux_weight=0.001, aux_scope="micro", aux_over="model")


def config(quick: bool) -> ModelConfig:
    """259 M parameters, 57 M of them at work for each token; quick: a tiny one."""
    layers, dim, heads, hidden, experts, vocab = (2, 64, 4, 32, 4, 512) if quick else (8, 512, 8, 1024, 16, 50257)
    return ModelConfig(
        vocab_size=vocab,
        max_positions=4096,
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=heads // 2,
        head_dim=dim // heads,
        hidden=hidden,
        norm_eps=1e-6,
        tied_head=False,
        experts=(experts,) * layers,
        moe=MoEConfig(top_k=2, hidden=hidden, gate=_GATE),
    )


def _sparse(
    layers: int, heads: int, kv_heads: int, experts: int, hidden: int, vocab: int, **more: Any
) -> ModelConfig:
    gate = GateConfig(renormalize="none" if more["qk_norm"] == "all" else "before_drop")
    sizes: dict[str, Any] = {"dim": 2048, "head_dim": 128, "max_positions": 4096, "tied_head": False, **more}
    return ModelConfig(
        vocab_size=vocab,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        experts=(experts,) * layers,
        moe=MoEConfig(top_k=8, hidden=hidden, gate=gate),
        **sizes,
    )


def olmoe() -> ModelConfig:
    """OLMoE-1B-7B: 6.9 B parameters, 1.3 B of them at work for each token."""
    return _sparse(16, 16, 16, 64, 1024, 50304, qk_norm="all")


def qwen3_30b() -> ModelConfig:
    """Qwen3-30B-A3B, but for 4096 positions in place of 40960: 30.5 B parameters, 3.3 B of them at work."""
    return _sparse(48, 32, 4, 128, 768, 151936, qk_norm="head", rope_theta=1e6, norm_eps=1e-6)


def tiny() -> ModelConfig:
    """The same kind, for tests."""
    return _sparse(2, 4, 2, 16, 32, 512, qk_norm="head", dim=64, head_dim=16, max_positions=256)


SHAPES = {"olmoe": olmoe, "qwen3_30b": qwen3_30b, "tiny": tiny}
"""Published shapes, whose weights are drawn where they are used."""


def shape_of(name: str) -> ModelConfig:
    """Raises ValueError: there is no such shape."""
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}: give one of {', '.join(SHAPES)}")
    return SHAPES[name]()


def make(folder: Path, shape: ModelConfig, seed: int = 0) -> None:
    """Writes the model in bf16 as a Mixtral that transformers opens too."""
    model = GPT(shape)
    fill(model, seed)
    with tempfile.TemporaryDirectory() as scratch:
        save_model(scratch, model, dtype=torch.bfloat16)
        write(folder, model_of(Path(scratch)), ordered("hf", "keep", "5GB", folder, False))


@torch.no_grad()
def fill(model: GPT, seed: int = 0) -> None:
    """Draws the weights in their places, on the model's own device and in its types."""
    device, dim = model.embed.weight.device, model.config.dim
    generator = torch.Generator(device).manual_seed(seed)
    common_D = 0.3 * torch.randn(dim, generator=generator, device=device)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            _draw_(name, weight, model.config, generator)
        if name == "embed.weight":
            weight += common_D


def _draw_(name: str, weight: Tensor, shape: ModelConfig, generator: torch.Generator) -> None:
    weight.normal_(generator=generator)
    if name == "embed.weight":
        return
    residual = 1 / math.sqrt(2 * shape.layers)
    scale = {"head": 3.0, "gate": 1.5, "out": residual, "w_out": 2 * residual}.get(_role(name), 1.0)
    weight *= scale / math.sqrt(weight.shape[-1])
    if _role(name) == "gate":
        lengths_E = torch.linspace(-0.5, 0.5, len(weight), device=weight.device).exp()
        weight *= lengths_E[torch.randperm(len(weight), generator=generator, device=weight.device), None]


def _role(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]
