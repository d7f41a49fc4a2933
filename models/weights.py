"""Models as directories: config.json, model.safetensors, tokenizer.json. Nothing here can run code from a file.

Tensors carry the names of the model's parameters and buffers; a tied head is not written twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..parallel.tensor import local_part
from .config import ModelConfig
from .gpt import GPT
from .shards import local_box
from .tokenizer import Tokenizer

MODEL_TYPE = "coterie"
WEIGHTS = "model.safetensors"


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """What config.json holds."""
    head = {"model_type": MODEL_TYPE, "architectures": ["CoterieForCausalLM"]}
    return head | json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """The config of `config_to_dict`; a field that is left out takes its default.

    Raises:
        ValueError: another model_type, an unknown field, a value of the wrong type or sizes that do not fit.
    """
    kind = data.get("model_type")
    if kind != MODEL_TYPE:
        raise ValueError(f"config.json has model_type {kind!r}, expected {MODEL_TYPE!r}")
    problems: list[str] = []
    ours = {k: v for k, v in data.items() if k not in ("model_type", "architectures")}
    config = _build(ModelConfig, ours, "", problems)
    if problems:
        raise ValueError("config.json: " + "; ".join(problems))
    return config


def _build(kind: type, data: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints, values = get_type_hints(kind), {}
    for name, value in data.items():
        hint = hints.get(name)
        if hint is None:
            problems.append(f"unknown field {prefix}{name}")
        elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
            values[name] = _build(hint, value, f"{prefix}{name}.", problems)  # type: ignore[arg-type]
        elif not _fits(hint, value):
            problems.append(f"{prefix}{name} is {value!r}, expected {getattr(hint, '__name__', hint)}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return None if problems else kind(**values)


def _fits(hint: Any, value: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(part, value) for part in get_args(hint))
    if isinstance(hint, type) and not get_args(hint):
        numbers = (int, float) if hint is float else hint
        return isinstance(value, numbers) and (hint is bool or not isinstance(value, bool))
    if getattr(hint, "__origin__", None) is tuple:
        return isinstance(value, list) and all(_fits(get_args(hint)[0], item) for item in value)
    return value in get_args(hint)  # a Literal


def read_config(directory: str | Path) -> ModelConfig:
    """The config of a model directory.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: it is not one of ours.
    """
    file = Path(directory) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{directory} is not a model directory: it has no config.json")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds no JSON object")
    return config_from_dict(data)


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, an empty dict elsewhere. Every rank must call it: shards are gathered
    one tensor at a time, so a rank never holds more than one whole tensor beside its shards."""
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if first:
            state[name] = whole.to("cpu", copy=True).contiguous()
    return state


def save_model(
    directory: str | Path, model: GPT, tokenizer: Tokenizer | None = None, *, dtype: torch.dtype | None = None
) -> None:
    """Writes a model directory; rank 0 writes, every rank of a parallelized model must call it.

    Args:
        directory: made if it is not there; a reader never sees half a file in it.
        model: plain or parallelized.
        tokenizer: written beside it.
        dtype: of the written matrices (the router stays in fp32); None: as they are.
    """
    state = full_state_dict(model)
    if not state:
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if dtype is not None:
        state = {name: tensor.to(_stored(name, dtype)) for name, tensor in state.items()}
    text = json.dumps(config_to_dict(model.config), indent=2) + "\n"
    config, weights = folder / "config.json.partial", folder / f"{WEIGHTS}.partial"
    try:
        config.write_text(text, encoding="utf-8")
        save_file(state, str(weights), metadata={"format": "pt"})
        weights.chmod(config.stat().st_mode)  # the library lets its owner alone read it
        os.replace(weights, folder / WEIGHTS)
        os.replace(config, folder / "config.json")
    finally:
        config.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")


def load_model(directory: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """Builds the model of a directory on one device.

    Args:
        directory: as `save_model` writes it.
        device: where the parameters go.
        dtype: of the matrices (the router stays in fp32); None: as stored.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: config or weights do not fit; every wrong tensor is named.
    """
    model = GPT(read_config(directory), device="meta")
    stored = _stored_dtype(Path(directory) / WEIGHTS) if dtype is None else dtype
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != stored and _stored(_role(module, name), stored) == stored:
                setattr(module, name, nn.Parameter(parameter.to(stored)))
    model.to_empty(device=device)
    load_weights(directory, model)
    return model


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    """Router weights and selection biases keep fp32 whatever the rest does."""
    return torch.float32 if ".gate." in f".{name}" else dtype


def _role(module: nn.Module, name: str) -> str:
    return f"gate.{name}" if type(module).__name__ == "Gate" else name


def _open(file: Path) -> Any:
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None


def _stored_dtype(file: Path) -> torch.dtype:
    with _open(file) as stored:
        names = [name for name in stored.keys() if "embed" in name] or list(stored.keys())  # noqa: SIM118
        return stored.get_tensor(names[0]).dtype if names else torch.float32


@torch.no_grad()
def load_weights(directory: str | Path, model: nn.Module) -> None:
    """Reads a directory's tensors into a materialised model; of a parallelized one each rank reads its shard alone.

    Raises:
        ValueError: tensors missing, unknown or of another shape: all of them in one message, and nothing is read.
    """
    file = Path(directory) / WEIGHTS
    wanted = model.state_dict()
    with _open(file) as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        problems = [f"{name} is missing" for name in wanted if name not in shapes]
        problems += [f"{name} is unknown" for name in shapes if name not in wanted]
        problems += [
            f"{name} has shape {list(shapes[name])}, expected {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in shapes and shapes[name] != tuple(tensor.shape)
        ]
        if problems:
            raise ValueError(f"{file} does not fit the model: " + "; ".join(problems))
        for name, tensor in wanted.items():
            if tensor.dim() == 0:
                local_part(tensor).copy_(stored.get_tensor(name))
            else:
                local_part(tensor).copy_(stored.get_slice(name)[local_box(tensor)])
