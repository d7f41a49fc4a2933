"""A checkpoint's tensors as whole ones, read in parts from the shards that its ranks wrote."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        check_whole(path, self._tensors)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """The tensor on the CPU, in pieces along its first axis of `size` bytes, or of one row if that is more. The
        files are closed at the end: what is mapped into memory meanwhile is this tensor's part of them."""
        tensor = self._tensors[name]
        with ExitStack() as stack:
            parts = []
            for chunk in tensor.chunks:
                file = self._places[MetadataIndex(name, chunk.offsets)].relative_path
                opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                parts.append((chunk.offsets, chunk.sizes, opened))
            if not tensor.size:
                yield parts[0][2].get_tensor(name)
                return
            row = tensor.properties.dtype.itemsize * math.prod(tensor.size[1:])
            step = max(1, size // max(1, row))
            for start in range(0, tensor.size[0], step):
                rows = torch.empty((min(step, tensor.size[0] - start), *tensor.size[1:]), dtype=self.dtype(name))
                for offsets, sizes, opened in parts:
                    _copy_overlap(rows, start, offsets, sizes, opened.get_slice(name))
                yield rows


def _copy_overlap(rows: Tensor, start: int, offsets: torch.Size, sizes: torch.Size, chunk: Any) -> None:
    """Fills what a stored chunk has of `rows`, which begin at row `start` of the whole tensor."""
    first, last = max(start, offsets[0]), min(start + len(rows), offsets[0] + sizes[0])
    if first >= last or not math.prod(sizes):
        return
    there = (slice(first - offsets[0], last - offsets[0]), *(slice(0, size) for size in sizes[1:]))
    beside = zip(offsets[1:], sizes[1:], strict=True)
    here = (slice(first - start, last - start), *(slice(offset, offset + size) for offset, size in beside))
    rows[here] = chunk[there]
