"""The model of a directory, as users name it: a model, a run, or one of the hub."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..models.files import is_there, read_json
from ..models.gpt import GPT
from ..models.hub import resolve
from ..models.tensor_files import has_weights
from ..models.tokenizer import Tokenizer
from ..models.weights import load_model
from .request import RequestError, SamplingParams

log = logging.getLogger("coterie")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def open_model(
    path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer | None]:
    """The model of a model directory, or of a run directory's `model/`, and its tokenizer if it has one.

    Args:
        path: the directory, or hf://org/name[@revision].
        device: None: cuda where there is one, else cpu.
        dtype: None: as stored.

    Raises:
        FileNotFoundError: the directory holds no model; the message says what was found instead.
        ValueError: its files do not fit together, or there is no such device.
    """
    at = _device(device)  # before anything is fetched
    folder = model_folder(resolve(path))
    tokenizer = open_tokenizer(folder)  # a damaged one is told before the weights are read
    return load_model(folder, device=at, dtype=dtype).eval(), tokenizer


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer beside a model, if it has one. ValueError: it is damaged."""
    return Tokenizer(folder) if (folder / "tokenizer.json").exists() else None


def keep_all(model: GPT) -> None:
    """No token is dropped from here on, whatever the model's `eval_capacity_factor` says: a drop would make an answer
    depend on who else is in the batch."""
    limited = [moe.gate for moe in model.moe_layers if moe.gate.config.eval_capacity_factor is not None]
    for gate in limited:
        gate.config = replace(gate.config, eval_capacity_factor=None)
    if limited:
        log.warning("the model's experts have a capacity outside training: it is served without, and drops nothing")


def generation_defaults(folder: Path) -> dict[str, Any]:
    """What a model's generation_config.json says of sampling, as settings of `SamplingParams`; {}: it has none.

    `do_sample` is passed over, as vLLM does: who wants greedy tokens asks for temperature 0.

    Raises:
        ValueError: the file is damaged, or a value has no meaning.
    """
    file = folder / "generation_config.json"
    told = read_json(file) if is_there(file) else {}
    found = {name: told[name] for name in _SAMPLING if told.get(name) is not None}
    if found.get("top_k") == -1:  # how some write "all"
        found["top_k"] = 0
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise ValueError(f"{file}: {error}") from None
    return found


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device {device!r} is not one of cpu, cuda") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def model_folder(path: Path) -> Path:
    """Where the model of a model directory or a run lies. FileNotFoundError: there is none; it says what is."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: give a model directory or a run directory")
    for folder in (path, path / "model"):
        if has_weights(folder):
            return folder
    if (path / "metrics.jsonl").exists() or (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"the run in {path} has not written its model/ yet: it does so at its end, so resume it and let it finish"
        )
    pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    why = f", and {pickles[0].name} is a pickle, which is never opened" if pickles else ""
    raise FileNotFoundError(f"{path} is not a model directory: it has no model.safetensors{why}")
