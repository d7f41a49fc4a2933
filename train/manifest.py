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


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"{PREFIX}{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first, whole or not."""
    found = [p for p in directory.glob(f"{PREFIX}*") if p.is_dir() and p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=step_of, reverse=True)


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


def same_model(path: Path, there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> None:
    """Compares the model parts of two configs.

    Raises:
        CheckpointError: names the first setting that differs.
    """
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if name in _FREE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            same_model(path, old, new, f"{prefix}{name}.")
        elif old != new:
            raise CheckpointError(
                f"checkpoint {path} holds another model: model.{prefix}{name} is {old} there and {new} here; "
                "give another --run-dir, or --checkpoint.resume never"
            )


def refuse_other_model(directory: Path, resume: str, model: dict[str, Any]) -> None:
    """A first look before anything is built: the checkpoint that a run would start from must hold its model.

    Raises:
        CheckpointError: it holds another one.
    """
    if resume == "never":
        return
    for path in list_checkpoints(directory) if resume == "auto" else [Path(resume)]:
        try:
            there = read_manifest(path)["model"]
        except CheckpointError:
            continue  # the search for a whole one comes later
        same_model(path, there, model)
        return
