"""Any model that coterie reads, as a directory that coterie or others read."""

from __future__ import annotations

from pathlib import Path

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
) -> None:
    """Writes a model directory from another one, a run or a checkpoint, piece by piece.

    Args:
        source: a model directory, ours or one in Hugging Face's layout, or what `export` takes.
        output: a new or an empty directory.
        to: coterie: ours. hf: the architecture of transformers that computes the same, else ours with what
            transformers wants beside it, for `models.transformers_model`.
        dtype: of the matrices; routers stay in fp32. keep: every tensor as it is stored.
        max_file_size: as `parse_bytes` reads it.
        step: which of a run's checkpoints; None: the newest whole one.
        force: replace the model that `output` holds.

    Raises:
        FileNotFoundError: the source is none.
        ValueError: it is damaged or asks for what coterie lacks, an output that exists, a word that is none of ours.
        OSError: the disk is full; `output` is as it was.
    """
    source, output = Path(source), Path(output)
    order = ordered(to, dtype, max_file_size, output, force)
    write(output, _open(source, step), order)


def _open(source: Path, step: int | None) -> Model:
    """A run's newest checkpoint goes before the model that it wrote at its end: it may have gone on since."""
    if (source / MANIFEST).exists() or list_checkpoints(source / "checkpoints") or list_checkpoints(source):
        return open_checkpoint(find(source, step))
    if step is not None:
        raise ValueError(f"a step was asked for, but {source} is no run with checkpoints")
    for folder in (source, source / "model"):
        if has_weights(folder):
            return model_of(folder)
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}: give a model directory, a checkpoint or a run directory")
    raise FileNotFoundError(f"{source} is neither a model directory (config.json, *.safetensors) nor a run's")
