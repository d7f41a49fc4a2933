"""Where the part that this rank holds lies, for tensors that a mesh has cut and for plain ones alike."""

from __future__ import annotations

from torch import Tensor

from ..parallel.tensor import is_cut


def local_box(tensor: Tensor) -> tuple[slice, ...]:
    """Where `parallel.tensor.local_part` lies in the whole tensor."""
    if not is_cut(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    # A DTensor does not say this in public; torch's own checkpoint code asks the same function.
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if not offset:
        return tuple(slice(0, 0) for _ in tensor.shape)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
