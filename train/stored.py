"""A checkpoint's tensors as whole ones, read in parts from the shards that its ranks wrote."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from .manifest import CheckpointError


def check_whole(path: Path, stored: dict[str, Any]) -> None:
    """Refuses a checkpoint whose shards do not make up each of its tensors: DCP would leave the rest as it was.

    Args:
        path: the checkpoint, for the message.
        stored: what the reader's metadata says of its tensors.

    Raises:
        CheckpointError: names the first tensor with a part missing or stored twice.
    """
    for name, tensor in stored.items():
        held, whole = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.size)
        if held != whole:
            fault = "lacks a part of" if held < whole else "holds twice a part of"
            raise CheckpointError(f"checkpoint {path} {fault} {name}: {held} elements instead of {whole}")


class StoredState:
    """The tensors of one checkpoint.

    Raises:
        CheckpointError: a tensor is not whole.
    """

    def __init__(self, path: Path) -> None:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
        self._tensors: dict[str, TensorStorageMetadata] = metadata.state_dict_metadata  # type: ignore[assignment]
        self._places: dict[MetadataIndex, Any] = metadata.storage_data
        self._files = ExitStack()
        self._opened: tuple[str, list[tuple[torch.Size, torch.Size, Any]]] = "", []
        check_whole(path, self._tensors)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A box of one tensor, on the CPU; (): all of it. The shards of the tensor that was read last stay open, so
        that no more is mapped into memory than its part of them."""
        tensor = self._tensors[name]
        if name != self._opened[0]:
            self.close()
            self._opened = name, [(c.offsets, c.sizes, self._open(name, c.offsets)) for c in tensor.chunks]
        if not tensor.size:
            return self._opened[1][0][2].get_tensor(name)
        box = box or tuple(slice(0, size) for size in tensor.size)
        found = torch.empty([b.stop - b.start for b in box], dtype=self.dtype(name))
        for offsets, sizes, opened in self._opened[1]:
            _copy_overlap(found, box, offsets, sizes, opened.get_slice(name))
        return found

    def _open(self, name: str, offsets: torch.Size) -> Any:
        file = self._places[MetadataIndex(name, offsets)].relative_path
        return self._files.enter_context(safe_open(file, framework="pt", device="cpu"))

    def close(self) -> None:
        """Closes the shards that are open."""
        self._files.close()
        self._opened = "", []


def _copy_overlap(found: Tensor, box: tuple[slice, ...], offsets: torch.Size, sizes: torch.Size, chunk: Any) -> None:
    """Fills what a stored chunk has of `found`, a box of the whole tensor."""
    if not math.prod(sizes):
        return
    here, there = [], []
    for wanted, offset, size in zip(box, offsets, sizes, strict=True):
        first, last = max(wanted.start, offset), min(wanted.stop, offset + size)
        if first >= last:
            return
        here.append(slice(first - wanted.start, last - wanted.start))
        there.append(slice(first - offset, last - offset))
    found[tuple(here)] = chunk[tuple(there)]
