"""Small models of every kind, and the real sharding without ranks: what the planner's tests share."""

from dataclasses import replace

import torch
import torch.distributed as dist

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.moe.config import GateConfig, MoEConfig
from coterie.parallel.layout import Layout
from coterie.parallel.mesh import build_mesh
from coterie.train.machines import MACHINES

H200 = MACHINES["h200"]
MODERN = ModelConfig(
    vocab_size=512,
    max_positions=64,
    layers=3,
    dim=32,
    heads=4,
    kv_heads=2,
    hidden=80,
    qk_norm="head",
    experts=(0, 4, 8),
    moe=MoEConfig(top_k=2, hidden=48, residual=True, gate=GateConfig(z_weight=1e-3)),
)
PAPER = ModelConfig(
    vocab_size=512,
    max_positions=64,
    layers=2,
    dim=32,
    heads=4,
    hidden=80,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    attention_bias="all",
    mlp_bias=True,
    experts=(0, 4),
    moe=MoEConfig(
        top_k=1,
        activation="gelu",
        bias=True,
        residual=True,
        gate=GateConfig(capacity_factor=1.0, renormalize="none", aux_scope="micro", drop_policy="random"),
    ),
)
SHARED = replace(MODERN, qk_norm="none", moe=MoEConfig(top_k=2, hidden=48, shared_hidden=40, shared_gate=True))
DENSE = replace(MODERN, experts=(), tied_head=False, kv_heads=0)
TINY = {"modern": MODERN, "paper": PAPER, "shared": SHARED, "dense": DENSE}


class _Fake:
    """A process group of many ranks that moves nothing."""

    def __init__(self, world: int) -> None:
        self.world = world

    def __enter__(self) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=self.world, store=FakeStore())

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()


def really_sharded(config: ModelConfig, layout: Layout) -> int:
    """Elements of rank 0 after the package's own `parallelize`, on the meta device and on ranks that move nothing."""
    model = GPT(config, device="meta")
    model.to_empty = lambda device: model  # type: ignore[assignment,method-assign,misc]
    with _Fake(layout.world):
        parallelize(
            model,
            build_mesh("cpu", dp_replicate=layout.dp_replicate, tp=layout.tp, ep=layout.ep, etp=layout.etp),
            dtype=torch.bfloat16,
        )
        locals_ = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        return sum(local.numel() for local in locals_)
