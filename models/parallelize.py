"""The one place where a model meets a mesh: cut over ranks, then sharded data parallelism around all."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..moe.exchanging import Dispatchers, Exchanging
from ..moe.layer import MoE
from ..parallel.mesh import Mesh
from .fit import check_fit
from .gpt import GPT, Block
from .tensor_parallel import keep_out_of_graphs, spread_experts, spread_tensors

log = logging.getLogger("coterie")


def parallelize(
    model: GPT,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    reshard: bool = True,
    compile: bool = False,
    even_splits: bool = False,
    exchanging: Exchanging | None = None,
) -> GPT:
    """Lays a model over the ranks of a mesh, in place, and returns it.

    Attention, dense feed-forward layers and the vocabulary are cut over tp; between them a rank holds S / tp
    positions of its sequences. A layer's experts are cut over its ep and etp. FSDP2 shards what is cut over the ranks
    that hold the same part, and all else over all ranks of a copy. Every rank's loss is that of its own positions,
    and gradients are SUMS over ranks: divide the loss by global counts.
    A model on the meta device comes back materialised with undefined values: call `init_weights` or load weights.

    Args:
        model: on the meta device, or real and equal on every rank.
        mesh: the ranks.
        dtype: what matrices compute in; parameters, gradients, the reduction and the router stay as the model has
            them, in fp32. None: no other than the model's.
        reshard: free gathered weights after each block's forward pass.
        compile: compile the dense parts of each block; where no compiler exists this says so and goes on.
        even_splits: with a capacity, send that many rows to every expert, so that no size is read on the host.
        exchanging: how rows travel to experts on other ranks. None: as its defaults say.

    Raises:
        ValueError: a degree or an exchange does not fit the model's sizes or the ranks.
    """
    if dtype == torch.float32:
        dtype = None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks: list[Block] = list(model.blocks)  # type: ignore[arg-type]
    check_fit(model.config, mesh.layout)
    compute = dtype or next(model.parameters()).dtype
    dispatchers = Dispatchers(exchanging or Exchanging(), mesh.device_type, compute.itemsize)
    spread_tensors(model, mesh)
    for block in blocks:
        if block.moe is not None:
            spread_experts(block.moe, mesh, dispatchers, even_splits)
    if compile and _can_compile(mesh.device_type):
        for block in blocks:
            _compile(block)
    if mesh.world > 1 or dtype is not None:
        _shard(model, blocks, mesh, policy, reshard)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=mesh.device_type)
    return model


def _shard(model: GPT, blocks: list[Block], mesh: Mesh, policy: MixedPrecisionPolicy, reshard: bool) -> None:
    """FSDP2 over the ranks that hold the same part of a module, block by block, then around what is left."""
    left: set[nn.Parameter] = set()
    cut = mesh.layout.tp > 1
    for block in blocks:
        if block.moe is not None:
            left |= _shard_moe(block.moe, mesh, policy, reshard)
        if cut:
            for module in (block.attention, block.mlp):
                left |= _shard_part(module, mesh.shard, policy, reshard) if module is not None else set()
        _fully_shard(block, mesh.whole, policy, reshard, left)
    # The embedding and the head are needed at both ends of the pass: gathering them once is less traffic.
    vocabulary = {*model.embed.parameters(), *(() if model.head is None else model.head.parameters())}
    if not cut or (mesh.shard.size() == 1 and policy.param_dtype is None):
        _fully_shard(model, mesh.whole, policy, False, left | (vocabulary if cut else set()))
        return
    for module in (model.positions, model.final_norm):
        if module is not None:
            _fully_shard(module, mesh.whole, policy, False, set())
    _fully_shard(model, mesh.shard, policy, False, left)


def _shard_moe(moe: MoE, mesh: Mesh, policy: MixedPrecisionPolicy, reshard: bool) -> set[nn.Parameter]:
    """Shards what does not belong to all ranks, or not in the block's dtype; returns what no one needs to shard."""
    if policy.param_dtype is not None:
        wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        _fully_shard(moe.gate, mesh.whole, wide, reshard, set())
    if not isinstance(moe.experts.w_in, DTensor):
        return set()
    return _shard_part(moe.experts, mesh.experts(moe.num_experts).edp, policy, reshard)


def _shard_part(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool
) -> set[nn.Parameter]:
    """Shards a module that is cut already; on one rank its gradient is whole, and there is nothing to gather, reduce
    or cast: returns its parameters instead."""
    if mesh.size() == 1 and policy.param_dtype is None:
        return set(module.parameters())
    _fully_shard(module, mesh, policy, reshard, set())
    return set()


def _fully_shard(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool, ignored: set[nn.Parameter]
) -> None:
    ranks = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Shard:
        # The first dimension needs no copy to gather. One that is cut already would interleave the ranks' parts.
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        cut = {p.dim for p in placements if isinstance(p, Shard)}
        whole = [d for d in range(parameter.dim()) if d not in cut]
        even = [d for d in whole if parameter.shape[d] % ranks == 0]
        if 0 in even or not even:
            return Shard(0)
        return Shard(max(even, key=lambda d: parameter.shape[d]))

    fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=reshard,
        shard_placement_fn=place,
        ignored_params=ignored,
    )
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _can_compile(device_type: str) -> bool:
    """True where torch.compile can make code for this device; else one sentence says why not."""
    try:
        if device_type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
            home = os.path.dirname(torch.__file__)
            if " " in home:  # torch gives its linker this folder without quotes
                raise RuntimeError(f"{home} has a space in its name")
        elif importlib.util.find_spec("triton") is None:
            raise RuntimeError("triton is not installed")
        return True
    except Exception as error:  # inductor raises several kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("torch.compile is left out, because there is no working compiler here (%s)", reason)
        return False


def _compile(block: Block) -> None:
    """Compiles attention with its norms, and a dense feed-forward; a MoE layer's own kernels are fused already."""
    keep_out_of_graphs(block)
    block.attend = torch.compile(block.attend)  # type: ignore[method-assign]
    if block.mlp is not None:
        block.mlp.forward = torch.compile(block.mlp.forward)  # type: ignore[method-assign]
