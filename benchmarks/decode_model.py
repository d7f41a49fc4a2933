"""A random model for measuring generation, whose routers prefer some experts as trained ones do.

Under a plain N(0, 0.02) every expert is visited alike and greedy text soon repeats itself. Here embeddings have unit
variance and a common part that each router sees, a router's rows have unlike lengths, and the head is wide enough
for one token to lead.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

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


def make(folder: Path, shape: ModelConfig, seed: int = 0) -> None:
    """Writes the model in bf16 as a Mixtral that transformers opens too."""
    model, generator = GPT(shape), torch.Generator().manual_seed(seed)
    common_D = 0.3 * torch.randn(shape.dim, generator=generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(_draw(name, weight, shape, generator))
            if name == "embed.weight":
                weight += common_D
    with tempfile.TemporaryDirectory() as scratch:
        save_model(scratch, model, dtype=torch.bfloat16)
        write(folder, model_of(Path(scratch)), ordered("hf", "keep", "5GB", folder, False))


def _draw(name: str, weight: Tensor, shape: ModelConfig, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(weight.shape, generator=generator)
    if name == "embed.weight":
        return drawn
    residual = 1 / math.sqrt(2 * shape.layers)
    scale = {"head": 3.0, "gate": 1.5, "out": residual, "w_out": 2 * residual}.get(_role(name), 1.0)
    drawn *= scale / math.sqrt(weight.shape[-1])
    if _role(name) == "gate":
        lengths_E = torch.linspace(-0.5, 0.5, len(drawn)).exp()
        drawn *= lengths_E[torch.randperm(len(drawn), generator=generator), None]
    return drawn


def _role(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]
