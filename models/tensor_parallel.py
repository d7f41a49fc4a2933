"""Cutting a model's parameters over tensor- and expert-parallel ranks, and giving its hooks their collectives."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..moe.exchanging import Dispatchers
from ..moe.experts import FeedForward, identity
from ..moe.layer import MoE
from ..moe.slices import Slices
from ..parallel.collectives import all_reduce_sum
from ..parallel.mesh import Mesh
from ..parallel.tensor import gather_sequence, once, own_positions, scatter_sequence, share, sum_over
from .attention import Attention
from .gpt import GPT, Block
from .layers import HeadsNorm
from .vocab_parallel import VocabParallel


def spread_tensors(model: GPT, mesh: Mesh, whole: bool = False) -> None:
    """Cuts attention by heads, dense feed-forward layers by their width and the vocabulary by words over tp.

    whole: every rank holds all positions between them, as inference does, where a sequence has few; else its share.
    """
    tp = mesh.tp
    if tp.size() == 1:
        return
    group = tp.get_group()
    vocabulary = VocabParallel(group, model.config.vocab_size, whole)
    if not whole:
        model.own = functools.partial(own_positions, group=group)
    model.embed.look_up, model.loss, model.logits = vocabulary.look_up, vocabulary.loss, vocabulary.logits
    _cut(model.embed, "weight", tp, 0)
    if model.head is not None:
        _cut(model.head, "weight", tp, 0)
    for block in model.blocks:
        _spread_attention(block.attention, tp, whole)  # type: ignore[arg-type]
        if block.mlp is not None:
            _spread_feed_forward(block.mlp, tp, whole)  # type: ignore[arg-type]
        if block.moe is not None:
            block.moe.gate.reduce_sequences = functools.partial(all_reduce_sum, group=group)  # type: ignore[union-attr]


def _spread_attention(attention: Attention, tp: DeviceMesh, whole: bool) -> None:
    for name in ("weight", "bias"):
        _cut(attention.q, name, tp, 0)
        _cut(attention.kv, name, tp, 1)
    _cut(attention.out, "weight", tp, 1)
    _hook(attention, tp, whole)
    group = tp.get_group()
    for norm in (attention.q_norm, attention.k_norm):
        if isinstance(norm, HeadsNorm):
            norm.share = functools.partial(_own_heads, group=group)
            norm.total = functools.partial(sum_over, group=group)
        elif norm is not None:
            norm.share = functools.partial(share, group=group)


def _own_heads(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's heads' part of a weight that all hold: it has one dimension, which FSDP cuts already."""
    return share(weight, group).chunk(group.size())[group.rank()]


def _spread_feed_forward(mlp: FeedForward, tp: DeviceMesh, whole: bool) -> None:
    for name in ("w_in", "b_in", "w_out"):
        _cut(mlp, name, tp, 1)
    _hook(mlp, tp, whole)


def _hook(module: Attention | FeedForward, tp: DeviceMesh, whole: bool) -> None:
    group = tp.get_group()
    if not whole:
        module.enter = functools.partial(gather_sequence, group=group)
    module.leave = functools.partial(all_reduce_sum if whole else scatter_sequence, group=group)
    module.once = functools.partial(once, group=group)


def keep_out_of_graphs(block: Block) -> None:
    """Leaves the collectives of a block's tensor-parallel parts to eager code, for torch.compile."""
    attention = block.attention
    owners = (attention, block.mlp, attention.q_norm, attention.k_norm)
    for owner in owners:
        for name in ("enter", "leave", "once", "share", "total"):
            hook = getattr(owner, name, identity)
            if hook is not identity:
                setattr(owner, name, torch.compiler.disable(hook))


def spread_experts(moe: MoE, mesh: Mesh, dispatchers: Dispatchers, even_splits: bool) -> None:
    """Cuts a layer's experts over its ranks and puts the exchanges around them."""
    moe.gate.reduce_counts = all_reduce_sum
    cut_experts(moe, mesh)
    if mesh.layout.experts(moe.num_experts).ep > 1:
        capacity = moe.gate.capacity if even_splits else None
        group = mesh.experts(moe.num_experts).ep.get_group()
        moe.dispatch = dispatchers.make(group, moe.gate, capacity)


def cut_experts(moe: MoE, mesh: Mesh) -> None:
    """Cuts a layer's experts over its ranks: by expert, and by their width where ranks slice them."""
    degrees, experts = mesh.layout.experts(moe.num_experts), moe.experts
    if degrees.ep == degrees.etp == 1:
        return
    meshes = mesh.experts(moe.num_experts)
    sliced = [2] if degrees.etp > 1 else []
    for name in ("w_in", "b_in", "w_out"):
        _cut(experts, name, meshes.cut, 0, *sliced)
    _cut(experts, "b_out", meshes.cut, 0, *([None] if sliced else []))
    if sliced:
        experts.slices = Slices(meshes.etp.get_group())
        experts.once = functools.partial(once, group=meshes.etp.get_group())


def _cut(owner: nn.Module, name: str, mesh: DeviceMesh, *dims: int | None) -> None:
    """Makes a parameter a DTensor: this rank's chunk of one dimension for each axis of the mesh; None: the whole."""
    whole: Tensor | None = getattr(owner, name)
    if whole is None:
        return
    mine = whole.detach()
    for axis, dim in enumerate(dims):
        if dim is not None:
            mine = mine.chunk(mesh.size(axis), dim)[mesh.get_local_rank(axis)]
    cut = DTensor.from_local(
        mine.clone(memory_format=torch.contiguous_format),
        mesh,
        [Replicate() if dim is None else Shard(dim) for dim in dims],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    setattr(owner, name, nn.Parameter(cut, requires_grad=whole.requires_grad))
