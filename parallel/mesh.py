"""The ranks as meshes: one for dense layers, and for every MoE layer its own expert x data parallel one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class ExpertMesh(NamedTuple):
    """Two views of all ranks: `ep` consecutive ranks share a layer's experts out; `edp` ranks hold the same ones."""

    ep: DeviceMesh
    edp: DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """All ranks of a run. Every layer of a pyramid has its own expert-parallel degree on the same ranks
    (DeepSpeed-MoE section 4.1.3: 128 GPUs, layers of 32/64/128 experts, EP 32/64/128 x expert-DP 4/2/1)."""

    rank: int
    world: int
    device_type: str
    dp: DeviceMesh
    ep: int = 1
    """The greatest expert-parallel degree that a layer may take."""
    _experts: dict[int, ExpertMesh] = field(default_factory=dict, repr=False, compare=False)

    def expert_degree(self, num_experts: int) -> int:
        """min(ep, num_experts), which must divide both the ranks and the experts, else ValueError."""
        degree = min(self.ep, num_experts)
        if self.world % degree == 0 and num_experts % degree == 0:
            return degree
        fitting = [d for d in range(1, self.world + 1) if self.world % d == 0 and num_experts % d == 0]
        near = sorted({max([d for d in fitting if d < degree], default=1), *[d for d in fitting if d > degree][:1]})
        raise ValueError(
            f"expert parallelism of {degree} does not divide both {self.world} ranks and {num_experts} experts: "
            f"the nearest that does is {' or '.join(map(str, near))}"
        )

    def experts(self, num_experts: int) -> ExpertMesh:
        """The meshes of a layer with `num_experts` experts. Equal shapes share one mesh. All ranks must ask in the
        same order, because a new shape makes process groups."""
        degree = self.expert_degree(num_experts)
        if degree not in self._experts:
            shape = (self.world // degree, degree)
            both = init_device_mesh(self.device_type, shape, mesh_dim_names=("edp", "ep"))
            self._experts[degree] = ExpertMesh(both["ep"], both["edp"])
        return self._experts[degree]


def build_mesh(device_type: str, *, ep: int = 1, tp: int = 1) -> Mesh:
    """The mesh of the process group that `init_ranks` opened.

    Raises:
        ValueError: `ep` does not divide the ranks, or `tp` is not 1.
    """
    if tp != 1:
        raise ValueError(f"tensor parallelism (tp={tp}) is not supported: use tp=1")
    world = dist.get_world_size()
    if ep < 1 or world % ep:
        fitting = [d for d in range(1, world + 1) if world % d == 0]
        raise ValueError(f"ep={ep} does not divide the {world} ranks of this run: take one of {fitting}")
    dp = init_device_mesh(device_type, (world,), mesh_dim_names=("dp",))
    return Mesh(dist.get_rank(), world, device_type, dp, ep)
