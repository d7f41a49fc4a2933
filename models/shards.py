"""Which part of a whole tensor this rank holds, for tensors that a mesh has cut and for plain ones alike."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(tensor: Tensor) -> Tensor:
    """The local values, shared with the tensor: writing to them writes to it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: Tensor) -> tuple[slice, ...]:
    """Where `local_part` lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    # A DTensor does not say this in public; torch's own checkpoint code asks the same function.
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if not offset:
        return tuple(slice(0, 0) for _ in tensor.shape)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
