"""Any model that coterie reads, as a directory that coterie or others read."""

from __future__ import annotations

from pathlib import Path

from ..models.deepspeed import open_deepspeed
from ..models.deepspeed_config import Hints
from ..models.hub import resolve
from ..models.tensor_files import has_weights
from ..models.write import Kind, Model, Width, model_of, ordered, write
from .export import find, open_checkpoint
from .manifest import MANIFEST, list_checkpoints


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: Kind = "coterie",
    dtype: Width = "keep",
    max_file_size: str = "5GB",
    step: int | None = None,
    force: bool = False,
    deepspeed: Hints | None = None,
) -> None:
    """Writes a model directory from another one, a run or a checkpoint, piece by piece.

    Args:
        source: a model directory, ours or one in Hugging Face's layout, a name of the hub, or what `export` takes.
        output: a new or an empty directory.
        to: coterie: ours. hf: the architecture of transformers that computes the same, else ours with what
            transformers wants beside it, for `models.transformers_model`.
        dtype: of the matrices; routers stay in fp32. keep: every tensor as it is stored.
        max_file_size: as `parse_bytes` reads it.
        step: which of a run's checkpoints; None: the newest whole one.
        force: replace the model that `output` holds.
        deepspeed: the source is a checkpoint of DeepSpeed, and this what it may not say of itself.

    Raises:
        FileNotFoundError: the source is none.
        ValueError: it is damaged or asks for what coterie lacks, an output that exists, a word that is none of ours.
        OSError: the disk is full; `output` is as it was.
    """
    output = Path(output)
    order = ordered(to, dtype, max_file_size, output, force)
    if deepspeed is not None:
        config, tensors = open_deepspeed(Path(source), hints=deepspeed)
        write(output, Model(config, tensors, {}, None), order)
        return
    write(output, _open(resolve(source), output, step), order)


def _open(source: Path, output: Path, step: int | None) -> Model:
    """A run's newest checkpoint goes before the model that it wrote at its end: it may have gone on since."""
    if (source / MANIFEST).exists() or list_checkpoints(source / "checkpoints") or list_checkpoints(source):
        return open_checkpoint(find(source, step), output)
    if step is not None:
        raise ValueError(f"a step was asked for, but {source} is no run with checkpoints")
    for folder in (source, source / "model"):
        if has_weights(folder):
            return model_of(folder)
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}: give a model directory, a checkpoint or a run directory")
    raise FileNotFoundError(f"{source} is neither a model directory (config.json, *.safetensors) nor a run's")
