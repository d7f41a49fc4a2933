"""The one place where a model meets a mesh: experts over ranks, then sharded data parallelism around all.

E experts.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..moe.dispatch import AllToAllDispatch
from ..moe.experts import Experts
from ..parallel.collectives import all_reduce_sum
from ..parallel.mesh import Mesh
from .gpt import GPT, Block

log = logging.getLogger("coterie")


def parallelize(
    model: GPT,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    reshard: bool = True,
    compile: bool = False,
    even_splits: bool = False,
) -> GPT:
    """Lays a model over the ranks of a mesh, in place, and returns it.

    A layer's experts are cut over its expert-parallel ranks (dimension 0), and FSDP2 shards them over the ranks that
    hold the same ones, and all else over all ranks. Gradients are SUMS over ranks: divide the loss by global counts.
    A model on the meta device comes back materialised with undefined values: call `init_weights` or load weights.

    Args:
        model: on the meta device, or real and equal on every rank.
        mesh: the ranks.
        dtype: what matrices compute in; parameters, gradients, the reduction and the router stay as the model has
            them, in fp32. None: no other than the model's.
        reshard: free gathered weights after each block's forward pass.
        compile: compile the dense parts of each block; where no compiler exists this says so and goes on.
        even_splits: with a capacity, send that many rows to every expert, so that no size is read on the host.

    Raises:
        ValueError: an expert-parallel degree that does not fit the ranks or a layer's experts.
    """
    if dtype == torch.float32:
        dtype = None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks: list[Block] = list(model.blocks)  # type: ignore[arg-type]
    for block in blocks:
        _spread_experts(block, mesh, even_splits)
    if compile and _can_compile(mesh.device_type):
        for block in blocks:
            _compile(block)
    if mesh.world > 1 or dtype is not None:
        _shard(model, blocks, mesh, policy, reshard)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=mesh.device_type)
    return model


def _spread_experts(block: Block, mesh: Mesh, even_splits: bool) -> None:
    """Cuts the layer's experts over its expert-parallel ranks and puts the all-to-all between them."""
    moe = block.moe
    if moe is None:
        return
    moe.gate.reduce_counts = functools.partial(_sum_over, group=mesh.dp)
    if mesh.expert_degree(moe.num_experts) == 1:
        return
    ep = mesh.experts(moe.num_experts).ep
    for name, whole in list(moe.experts.named_parameters(recurse=False)):
        mine = whole.detach().chunk(ep.size())[ep.get_local_rank()].clone()
        cut = DTensor.from_local(mine, ep, [Shard(0)], run_check=False)
        setattr(moe.experts, name, nn.Parameter(cut, requires_grad=whole.requires_grad))
    capacity = moe.gate.capacity if even_splits else None
    moe.dispatch = AllToAllDispatch(ep.get_group(), moe.num_experts, capacity)


def _sum_over(counts_E: Tensor, group: DeviceMesh) -> Tensor:
    return all_reduce_sum(counts_E, group.get_group())


def _shard(model: GPT, blocks: list[Block], mesh: Mesh, policy: MixedPrecisionPolicy, reshard: bool) -> None:
    """FSDP2 over the experts' ranks, then over all ranks block by block, then around what is left."""
    left: set[nn.Parameter] = set()
    for block in blocks:
        if block.moe is not None:
            left |= _shard_moe(block.moe.experts, block.moe.gate, mesh, policy, reshard)
        _fully_shard(block, mesh.dp, policy, reshard, left)
    # The embedding and the head are needed at both ends of the pass: gathering them once is less traffic.
    _fully_shard(model, mesh.dp, policy, False, left)


def _shard_moe(
    experts: Experts, gate: nn.Module, mesh: Mesh, policy: MixedPrecisionPolicy, reshard: bool
) -> set[nn.Parameter]:
    """Shards what does not belong to all ranks, or not in the block's dtype; returns what no one needs to shard."""
    if policy.param_dtype is not None:
        wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        _fully_shard(gate, mesh.dp, wide, reshard, set())
    if not isinstance(experts.w_in, DTensor):
        return set()
    edp = mesh.experts(gate.weight.shape[0]).edp  # type: ignore[index]
    if edp.size() == 1 and policy.param_dtype is None:
        # Each expert lives on one rank, whose gradient is whole: nothing to gather, reduce or cast.
        return set(experts.parameters())
    _fully_shard(experts, edp, policy, reshard, set())
    return set()


def _fully_shard(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool, ignored: set[nn.Parameter]
) -> None:
    size = mesh.size()

    def place(parameter: nn.Parameter) -> Shard | None:
        # Dimension 0 of a stack of experts is cut already; a second cut would interleave experts over ranks.
        if not isinstance(parameter, DTensor):
            return None
        return next((Shard(d) for d in range(1, parameter.dim()) if parameter.shape[d] % size == 0), None)

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
    block.attend = torch.compile(block.attend)  # type: ignore[method-assign]
    if block.mlp is not None:
        block.mlp.forward = torch.compile(block.mlp.forward)  # type: ignore[method-assign]
