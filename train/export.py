"""From a checkpoint of any layout to a model directory, piece by piece, without ranks and in little memory."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.config import ModelConfig
from ..models.gpt import GPT
from ..models.tensor_files import Drafts, Head, has_weights, write_tensors
from ..models.tokenizer import Tokenizer
from ..models.weights import begin_model, stored_dtype
from .config import DataConfig, TrainConfig, from_dict
from .expert_prints import Prints, as_text, compare, print_rows
from .manifest import MANIFEST, CheckpointError, list_checkpoints, read_manifest, step_of, verify
from .stored import StoredState

log = logging.getLogger("coterie")
PIECE = 2**22
"""Bytes that are read at a time, or one row of a tensor's first axis if that is more."""
_UNITS = {"": 1, **{f"{u}{i}": (1024 if i else 1000) ** p for p, u in enumerate("kmgt", 1) for i in ("", "i")}}


def export(
    source: str | Path,
    output: str | Path,
    *,
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
    max_file_size: str = "5GB",
    step: int | None = None,
    force: bool = False,
) -> Path:
    """Writes the model of a checkpoint as a model directory; returns the checkpoint's path.

    At most one tensor of the checkpoint is mapped into memory at a time, and `PIECE` bytes of it are copied. Every
    expert is held against its print in the manifest before anything is put in place.

    Args:
        source: a run directory or a checkpoint in it.
        output: a new or an empty directory.
        dtype: of the matrices; the routers stay in fp32.
        max_file_size: as `parse_bytes` reads it.
        step: which of a run's checkpoints; None: the newest whole one.
        force: replace the model that `output` holds.

    Raises:
        ValueError: no checkpoint, a damaged one, an output that exists, a size or dtype that is none.
        OSError: the disk is full; `output` is as it was.
    """
    source, output = Path(source), Path(output)
    limit = parse_bytes(max_file_size)
    if dtype not in ("keep", "float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is not one of keep, float32, bfloat16")
    check_output(output, force)
    checkpoint = find(source, step)
    manifest, stored = read_manifest(checkpoint), StoredState(checkpoint)
    config: ModelConfig = from_dict(manifest["model"], ModelConfig)
    heads = _heads(checkpoint, config, stored, None if dtype == "keep" else getattr(torch, dtype))
    drafts = begin_model(output, config, _tokenizer(checkpoint.parent.parent))
    try:
        _write(drafts, heads, stored, checkpoint, manifest.get("experts", {}), limit)
    except BaseException:
        drafts.discard()
        raise
    drafts.publish()
    return checkpoint


def parse_bytes(text: str) -> int:
    """Bytes of "5GB", "500 MB", "1.5gib" or "1000000".

    Raises:
        ValueError: it is no size, or none above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size: give a number of bytes, or one with KB, MB, GB, TB, KiB, MiB, ...")
    return size


def find(source: Path, step: int | None = None) -> Path:
    """The checkpoint to read: `source` itself, or that of `step` or the newest whole one of a run directory.

    Raises:
        CheckpointError: there is none, or not of that step, or it is damaged.
    """
    if (source / MANIFEST).exists():
        own = verify(source)["progress"]["step"]
        if step not in (None, own):
            raise CheckpointError(f"{source} is the checkpoint of step {own}, not {step}: give the run directory")
        return source
    found = list_checkpoints(source / "checkpoints") or list_checkpoints(source)
    if not found:
        raise CheckpointError(f"{source} is neither a checkpoint nor a run directory that holds one")
    if step is not None:
        chosen = [path for path in found if step_of(path) == step]
        if not chosen:
            steps = ", ".join(str(step_of(path)) for path in reversed(found))
            raise CheckpointError(f"{source} has no checkpoint of step {step}: it has those of steps {steps}")
        found = chosen
    problems = []
    for path in found:
        try:
            verify(path)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning(f"{problem}; passing over it")
        return path
    raise CheckpointError(f"{problems[0]}; there is no whole one to export instead")


def check_output(output: Path, force: bool) -> None:
    """Raises ValueError when `output` is there and must not be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise ValueError(f"{output} exists: give another output, or force to replace the model in it")
    if not has_weights(output):
        raise ValueError(f"{output} holds no model that could be replaced: give another output")


def _heads(checkpoint: Path, config: ModelConfig, stored: StoredState, dtype: torch.dtype | None) -> dict[str, Head]:
    """What is to be written, in the model's own order."""
    wanted = GPT(config, device="meta").state_dict()
    there = {name.removeprefix("model.") for name in stored.names() if name.startswith("model.")}
    odd = sorted(there ^ wanted.keys())
    odd += [n for n, t in wanted.items() if n in there and stored.shape(f"model.{n}") != tuple(t.shape)]
    if odd:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not hold the model that its {MANIFEST} describes: {odd[0]} differs"
        )
    kinds = {n: stored.dtype(f"model.{n}") if dtype is None else stored_dtype(n, dtype) for n in wanted}
    return {name: Head(kinds[name], tuple(tensor.shape)) for name, tensor in wanted.items()}


def _write(
    drafts: Drafts, heads: dict[str, Head], stored: StoredState, checkpoint: Path, saved: Prints, limit: int
) -> None:
    found: Prints = {}

    def pieces(name: str) -> Iterator[Tensor]:
        name = f"model.{name}"
        for piece in stored.pieces(name, PIECE):
            if name in saved:
                found.setdefault(name, []).extend(as_text(print_rows(piece, piece.shape[1:])))
            yield piece

    write_tensors(drafts, heads, pieces, limit)
    compare(checkpoint, saved, found)


def tokenizer_path(data: DataConfig) -> Path:
    """What the data was made with: named in the config, or beside the first prefix."""
    return Path(data.tokenizer or f"{data.train[0]}.tokenizer.json")


def _tokenizer(run: Path) -> Tokenizer | None:
    """The run's, from where its data was, or from the model that it exported at its end."""
    paths = [run / "model" / "tokenizer.json"]
    try:
        told: dict[str, Any] = json.loads((run / "config.json").read_text(encoding="utf-8"))
        config: TrainConfig = from_dict(told)
        paths.insert(0, tokenizer_path(config.data))
    except (OSError, ValueError, IndexError):
        pass  # the checkpoint was taken elsewhere, or an entry without token files wrote it
    for path in paths:
        if path.exists():
            return Tokenizer(path)
    log.warning(f"{paths[0]} is not there: the model is exported without a tokenizer, put tokenizer.json beside it")
    return None
