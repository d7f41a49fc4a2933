"""The ranks as meshes: one for dense layers, and for every MoE layer its own expert x data parallel one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .layout import ExpertLayout, Layout, fill


class ExpertMesh(NamedTuple):
    """Views of all ranks for one MoE layer."""

    ep: DeviceMesh
    """Ranks that share the experts out."""
    etp: DeviceMesh
    """Neighbours that hold slices of the same experts."""
    cut: DeviceMesh
    """What the experts' parameters are cut over: ep, or ep x etp where experts are sliced."""
    edp: DeviceMesh
    """Ranks that hold the same parts: one axis, or copies x shards."""


@dataclass(frozen=True)
class Mesh:
    """All ranks of a run. Every layer of a pyramid has its own expert-parallel degree on the same ranks
    (DeepSpeed-MoE section 4.1.3: 128 GPUs, layers of 32/64/128 experts, EP 32/64/128 x expert-DP 4/2/1)."""

    rank: int
    device_type: str
    layout: Layout
    tp: DeviceMesh
    """Neighbours that hold parts of the same dense layers and read the same sequences."""
    shard: DeviceMesh
    """Where parameters that tp cuts are sharded: dp_shard, or dp_replicate x dp_shard."""
    whole: DeviceMesh
    """Where all other parameters are: dp_shard and tp as one axis, after dp_replicate if there are copies."""
    _experts: dict[ExpertLayout, ExpertMesh] = field(default_factory=dict, repr=False, compare=False)

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.layout.world

    def experts(self, count: int) -> ExpertMesh:
        """The meshes of a layer with `count` experts. Equal shapes share one mesh. All ranks must ask in the same
        order, because a new shape makes process groups.

        Raises:
            ValueError: the experts do not spread over the ranks.
        """
        shape = self.layout.experts(count)
        if shape not in self._experts:
            self._experts[shape] = _expert_mesh(self.device_type, shape, self.layout.dp_replicate)
        return self._experts[shape]


def build_mesh(device_type: str, *, dp_replicate: int = 1, tp: int = 1, ep: int = 1, etp: int = 1) -> Mesh:
    """The mesh of the process group that `init_ranks` opened; what the degrees leave is dp_shard.

    Raises:
        ValueError: the degrees do not divide the ranks.
    """
    layout = fill(dist.get_world_size(), dp_replicate=dp_replicate, tp=tp, ep=ep, etp=etp)
    shape = (dp_replicate, layout.dp_shard, tp)
    dense = init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    if dp_replicate > 1:
        shard = dense["dp_replicate", "dp_shard"]
        names = ("dp_replicate", "dp_shard_tp")
        whole = shard
        if tp > 1:
            whole = init_device_mesh(device_type, (dp_replicate, layout.dp_shard * tp), mesh_dim_names=names)
    else:
        shard = dense["dp_shard"]
        whole = shard if tp == 1 else init_device_mesh(device_type, (layout.world,), mesh_dim_names=("dp_shard_tp",))
    return Mesh(dist.get_rank(), device_type, layout, dense["tp"], shard, whole)


def _expert_mesh(device_type: str, shape: ExpertLayout, dp_replicate: int) -> ExpertMesh:
    edp, ep, etp = shape
    copies = dp_replicate if edp % dp_replicate == 0 else 1  # a group of experts may span the copies
    names = ("edp_replicate", "edp_shard", "ep", "etp")
    every = init_device_mesh(device_type, (copies, edp // copies, ep, etp), mesh_dim_names=names)
    cut = every["ep"] if etp == 1 else every["ep", "etp"]
    return ExpertMesh(
        every["ep"], every["etp"], cut, every["edp_shard"] if copies == 1 else every["edp_replicate", "edp_shard"]
    )
