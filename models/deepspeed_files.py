"""Reads the files of a DeepSpeed-MoE training checkpoint without running what a pickle asks for.

Sources: the file names and keys that DeepSpeed's engine and Megatron-DeepSpeed write
(github.com/deepspeedai/DeepSpeed edaa722, deepspeed/runtime/engine.py; Megatron-DeepSpeed 4efb479, megatron/).
"""

from __future__ import annotations

import argparse
import contextlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .files import checked_size, is_there, open_checked

PICKLE_BYTES = 2**26
"""The most that the part of a file beside its tensors may take."""

_MAIN = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_(\d+)_model_states\.pt")
_ZERO3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_STAGE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
# Whose classes stand in such files beside the weights (enums in the arguments, the state of a random generator):
# each is read as `_Inert`, so that none of their code is looked up.
_BYSTANDERS = ("megatron.", "deepspeed.", "numpy.")


class Checkpoint(NamedTuple):
    """What the model files hold."""

    folder: Path
    ranks: list[dict[str, Tensor]]
    """Of each tensor-parallel rank, its tensors by their full names, the experts' among them."""
    args: dict[str, Any] | None
    """The training's arguments, if they were stored."""
    version: float
    """Megatron's version of the layout of queries, keys and values."""


class _Inert:
    """Takes the place of an object that does not matter: it takes every state and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Opens all model files of a checkpoint; the tensors stay in the files until they are used.

    Args:
        folder: one checkpoint (`global_step1000`), or the folder of several, whose `latest` names one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds objects that are not weights, or the checkpoint is of a kind that has its
            weights elsewhere (ZeRO 3, pipeline stages).
    """
    folder = _step(Path(folder))
    names = sorted(file.name for file in folder.iterdir())
    mains = {int(found[1]): name for name in names if (found := _MAIN.fullmatch(name))}
    _check_kind(folder, names, mains)
    ranks: list[dict[str, Tensor]] = []
    args, version = None, 0.0
    for rank in range(len(mains)):
        data = _load(folder / mains[rank])
        weights = data.get("module", data.get("model"))
        if not isinstance(weights, dict):
            raise ValueError(f"{folder / mains[rank]} holds no model: expected its weights under 'module'")
        # Of experts a rank's own file has stale copies at most, under its local numbers.
        flat = _flat(weights)
        ranks.append({name: tensor for name, tensor in flat.items() if ".deepspeed_experts." not in name})
        if rank == 0:
            args = vars(data["args"]) if isinstance(data.get("args"), argparse.Namespace) else None
            version = data.get("checkpoint_version", 0.0)
    if not isinstance(version, int | float):
        raise ValueError(f"{folder / mains[0]} has checkpoint_version {version!r}, expected a number")
    for name in names:
        if (found := _EXPERT.fullmatch(name)) and int(found[1]) < len(ranks):
            _add(ranks[int(found[1])], _flat(_load(folder / name)), folder / name)
    return Checkpoint(folder, ranks, args, float(version))


def _step(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of a DeepSpeed checkpoint")
    if not is_there(folder / "latest"):
        return folder
    with open_checked(folder / "latest", 4096) as file:
        tag = file.read().decode(errors="replace").strip()
    if not re.fullmatch(r"\w[\w.-]*", tag):
        raise ValueError(f"{folder / 'latest'} holds {tag!r}, expected the name of a folder beside it")
    if not (folder / tag).is_dir():
        raise FileNotFoundError(f"{folder / 'latest'} names {tag}, but there is no such folder beside it")
    return folder / tag


def _check_kind(folder: Path, names: list[str], mains: dict[int, str]) -> None:
    if any(_ZERO3.fullmatch(name) for name in names):
        raise ValueError(
            f"{folder} was written under ZeRO stage 3, which scatters the weights over files of optimizer state: "
            "make it whole with DeepSpeed's zero_to_fp32 first"
        )
    if any(_STAGE.fullmatch(name) for name in names):
        raise ValueError(f"{folder} was written by pipeline stages, which hold no DeepSpeed experts: not read yet")
    if not mains:
        raise FileNotFoundError(f"{folder} has no mp_rank_00_model_states.pt: it is no DeepSpeed checkpoint")
    if sorted(mains) != list(range(len(mains))):
        raise FileNotFoundError(f"{folder} has mp_rank files {sorted(mains)}, but they should count from 0 on")


def _load(file: Path) -> dict[str, Any]:
    checked_size(file)
    try:
        _check_archive(file)
        with _nothing_allowed():
            found = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
            strange = sorted(set(found) - {"argparse.Namespace"})
            bad = [name for name in strange if not name.startswith(_BYSTANDERS)]
            if bad:
                raise ValueError(f"it asks for {bad[0]!r}, which is no weight and is not run")
            torch.serialization.add_safe_globals([argparse.Namespace, *((_Inert, name) for name in strange)])
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # an unpickler's stack machine fails in as many ways as there are types
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is no file of weights that can be read safely: {words[:300]}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}, expected a dict of weights")
    return data


@contextlib.contextmanager
def _nothing_allowed() -> Iterator[None]:
    """What other packages allow to be unpickled (megatron-core does, when it is imported) is not allowed in here."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _check_archive(file: Path) -> None:
    """The archive's parts lie in it as they are, and what is not tensors is small."""
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its part {part.filename!r} is compressed")
            if part.filename.endswith(".pkl") and part.file_size > PICKLE_BYTES:
                raise ValueError(f"its {part.filename!r} has {part.file_size} bytes, more than {PICKLE_BYTES}")


def _flat(table: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of nested dicts, under their keys joined by dots."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, dict[Any, Any]]] = [("", table)]
    for _ in range(10**6):  # a pickle can hold a dict that holds itself
        if not waiting:
            return found
        prefix, level = waiting.pop()
        for key, value in level.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{key}.", value))
            elif isinstance(value, Tensor):
                found[f"{prefix}{key}"] = _whole(value, f"{prefix}{key}")
    raise ValueError("the checkpoint's weights lie in dicts without end")


def _whole(tensor: Tensor, name: str) -> Tensor:
    """The tensor, if the file holds every one of its numbers: a stride of 0 would make much of one."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise ValueError(f"the checkpoint's {name!r} is no tensor of which every number is stored")
    return tensor.detach()


def _add(rank: dict[str, Tensor], more: dict[str, Tensor], file: Path) -> None:
    for name, tensor in more.items():
        if name in rank:
            raise ValueError(f"{file} holds {name!r}, but another file does too")
        rank[name] = tensor
