"""What a checkpoint directory says of itself: its manifest, its files' sizes and hashes, its model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 2
PREFIX = "step_"
CHECKPOINTS = "checkpoints"
"""The folder of a run directory that holds them."""
# What a model may change between two starts without being another model.
_FREE = {"init_std", "aux_weight", "aux_scope", "z_weight", "bias_update", "noise", "jitter_eps", "second_expert"}
_FREE |= {"capacity_factor", "eval_capacity_factor", "min_capacity", "drop_policy"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or must not be read; one sentence."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands. What decides the next step's data, rate and noise."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    world: int = 1
    order: str = ""
    """Of the samples so far, a digest; "": not told."""


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"{PREFIX}{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first, whole or not."""
    found = [p for p in directory.glob(f"{PREFIX}*") if p.is_dir() and p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def candidates(directory: Path, resume: str) -> list[Path]:
    """What a run may start from under the setting `resume`, best first: `directory` holds its own checkpoints."""
    if resume == "never":
        return []
    if resume == "auto":
        return list_checkpoints(directory)
    asked = Path(resume)
    inside = [] if (asked / MANIFEST).exists() else list_checkpoints(asked / CHECKPOINTS) or list_checkpoints(asked)
    return inside or [asked]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_of(manifest: dict[str, Any]) -> str:
    body = {k: v for k, v in manifest.items() if k != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, when it is one and unaltered.

    Raises:
        CheckpointError: it is missing, not JSON, or does not match its own seal.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} is damaged: it has no {MANIFEST}") from None
    except ValueError:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("seal") != seal_of(manifest):
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} was altered")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {manifest['format']}; this version reads {FORMAT}")
    return manifest


def verify(path: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Checks sizes of all files and the hashes of this rank's share of them; returns the manifest.

    Raises:
        CheckpointError: names the checkpoint, the file and what is wrong.
    """
    manifest = read_manifest(path)
    strangers = sorted(p.name for p in path.glob("*.safetensors") if p.name not in manifest["files"])
    if strangers:
        raise CheckpointError(f"checkpoint {path} is damaged: {strangers[0]} does not belong to it")
    for i, (name, entry) in enumerate(sorted(manifest["files"].items())):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} has {size} bytes, not {entry['bytes']}")
        if i % world == rank and digest(file) != entry["sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: the content of {name} was altered")
    return manifest


def first_difference(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first setting that makes two model configs different models: its name and both values; None: the same."""
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if name in _FREE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found = first_difference(old, new, f"{prefix}{name}.")
            if found is not None:
                return found
        elif old != new:
            return f"{prefix}{name}", old, new
    return None


def same_model(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Compares the model parts of two configs.

    Raises:
        CheckpointError: names the first setting that differs.
    """
    found = first_difference(there, here)
    if found is not None:
        raise CheckpointError(
            f"checkpoint {path} holds another model: model.{found[0]} is {found[1]} there and {found[2]} here; "
            "give another --run-dir, or --checkpoint.resume never"
        )


def same_order(path: Path, stored: Progress, order: str) -> None:
    """A run must go on in the order of samples in which it began.

    Raises:
        CheckpointError: the first samples, as `order` digests them, are not those that the checkpoint has seen.
    """
    if stored.order and order and stored.order != order:
        raise CheckpointError(
            f"checkpoint {path} has seen other samples than this run begins with: the data, the seed, seq_len or the "
            "length of the run was changed (another number of epochs has another order); change it back, or give "
            f"--checkpoint.resume {path} to go on in the new order"
        )


def refuse_other_model(directory: Path, resume: str, model: dict[str, Any]) -> None:
    """A first look before anything is built: the checkpoint that a run would start from must hold its model.

    Raises:
        CheckpointError: it holds another one.
    """
    for path in candidates(directory, resume):
        try:
            there = read_manifest(path)["model"]
        except CheckpointError:
            continue  # the search for a whole one comes later
        same_model(path, there, model)
        return
