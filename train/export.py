"""From a checkpoint of any layout to a model directory, piece by piece, without ranks and in little memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.config import ModelConfig
from ..models.hf import shapes_of
from ..models.parts import Box
from ..models.tokenizer import Tokenizer
from ..models.write import BESIDE, Kind, Model, Width, ordered, write
from .config import DataConfig, TrainConfig, from_dict
from .expert_prints import Prints, as_text, compare, print_rows
from .manifest import MANIFEST, CheckpointError, list_checkpoints, read_manifest, step_of, verify
from .stored import StoredState

log = logging.getLogger("coterie")


def export(
    source: str | Path,
    output: str | Path,
    *,
    to: Kind = "coterie",
    dtype: Width = "keep",
    max_file_size: str = "5GB",
    step: int | None = None,
    force: bool = False,
) -> Path:
    """Writes the model of a checkpoint as a model directory; returns the checkpoint's path.

    Args:
        source: a run directory or a checkpoint in it.
        output: a new or an empty directory.
        to: see `convert`.
        dtype: of the matrices; the routers stay in fp32.
        max_file_size: as `parse_bytes` reads it.
        step: which of a run's checkpoints; None: the newest whole one.
        force: replace the model that `output` holds.

    Raises:
        ValueError: no checkpoint, a damaged one, an output that exists, a size or dtype that is none.
        OSError: the disk is full; `output` is as it was.
    """
    source, output = Path(source), Path(output)
    order = ordered(to, dtype, max_file_size, output, force)
    checkpoint = find(source, step)
    write(output, open_checkpoint(checkpoint, output), order)
    return checkpoint


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


def open_checkpoint(checkpoint: Path, output: Path) -> Model:
    """The model of a whole checkpoint, with the tokenizer of its run. Every expert that is read is held against its
    print in the manifest. `output`: where it will go; without a tokenizer of the run it keeps its own.

    Raises:
        CheckpointError: it does not hold the model that it describes.
    """
    manifest, stored = read_manifest(checkpoint), StoredState(checkpoint)
    config: ModelConfig = from_dict(manifest["model"], ModelConfig)
    wanted = shapes_of(config)
    there = {name.removeprefix("model.") for name in stored.names() if name.startswith("model.")}
    odd = sorted(there ^ wanted.keys())
    odd += [name for name, shape in wanted.items() if name in there and stored.shape(f"model.{name}") != shape]
    if odd:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not hold the model that its {MANIFEST} describes: {odd[0]} differs"
        )
    tokenizer = _tokenizer(checkpoint.parent.parent, output)
    beside = {name: (output / name).read_bytes() for name in BESIDE if (output / name).is_file()}
    if tokenizer is not None:
        beside = {name: text.encode() for name, text in tokenizer.files().items()}
    tensors = _Watched(checkpoint, list(wanted), stored, manifest.get("experts", {}))
    return Model(config, tensors, beside, tokenizer, tensors.check)


class _Watched:
    """A checkpoint's model, whose experts are printed as they are read: each of their elements once."""

    def __init__(self, checkpoint: Path, names: list[str], stored: StoredState, saved: Prints) -> None:
        self.source = checkpoint
        self._names, self._stored, self._saved = names, stored, saved
        self._sums = {name: [0] * len(prints) for name, prints in saved.items() if name.startswith("model.")}

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(f"model.{name}")

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(f"model.{name}")

    def read(self, name: str, box: Box) -> Tensor:
        found, key = self._stored.read(f"model.{name}", box), f"model.{name}"
        if key in self._sums:
            box = box or tuple(slice(0, size) for size in found.shape)
            sums = print_rows(found, self.shape(name)[1:], [b.start for b in box[1:]])
            for expert, value in enumerate(sums, box[0].start):
                self._sums[key][expert] += value
        return found

    def check(self) -> None:
        """Raises CheckpointError where an expert is not the one that was saved, all having been read."""
        self._stored.close()
        compare(self.source, self._saved, {name: as_text(sums) for name, sums in self._sums.items()})


def tokenizer_path(data: DataConfig) -> Path:
    """What the data was made with: named in the config, or beside the first prefix."""
    return Path(data.tokenizer or f"{data.train[0]}.tokenizer.json")


def _tokenizer(run: Path, output: Path) -> Tokenizer | None:
    """The run's, from where its data was, or from the model that it exported at its end; None leaves `output`'s."""
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
    kept = (output / "tokenizer.json").exists()
    without = "the model is exported without a tokenizer, put tokenizer.json beside it"
    log.warning(f"{paths[0]} is not there: {f'{output} keeps the tokenizer that it had' if kept else without}")
    return None
