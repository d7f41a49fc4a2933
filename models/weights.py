"""Models as directories: config.json, model*.safetensors, tokenizer.json. Nothing here can run code from a file.

Tensors carry the names of the model's parameters and buffers; a tied head is not written twice.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..parallel.tensor import local_part
from .config import ModelConfig
from .gpt import GPT
from .shards import local_box
from .tensor_files import FILE_BYTES, KINDS, Drafts, Head, StoredTensors, write_tensors
from .tokenizer import TOKENIZER_CONFIG, Tokenizer

MODEL_TYPE = "coterie"
STORED_DTYPES = {kind: dtype for dtype, kind in KINDS.items()}


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


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, an empty dict elsewhere. Every rank must call it: shards are gathered
    one tensor at a time, so a rank never holds more than one whole tensor beside its shards."""
    return _gathered(model.state_dict())


@torch.no_grad()
def _gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if _first():
            state[name] = whole.to("cpu", copy=True).contiguous()
    return state


def _first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def save_model(
    directory: str | Path,
    model: GPT,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes a model directory; rank 0 writes, every rank of a parallelized model must call it.

    Args:
        directory: made if it is not there; a reader never sees half a file in it.
        model: plain or parallelized. Rank 0 holds one whole tensor at a time.
        tokenizer: written beside it.
        dtype: of the written matrices (the router stays in fp32); None: as they are.
        file_bytes: a larger model becomes `model-0000i-of-0000n.safetensors` and an index, as Hugging Face has it.

    Raises:
        OSError: on rank 0, for a full disk or a forbidden directory, after all ranks have done their part.
    """
    state = model.state_dict()
    heads = {
        name: Head(tensor.dtype if dtype is None else stored_dtype(name, dtype), tuple(tensor.shape))
        for name, tensor in state.items()
    }
    drafts = begin_model(directory, model.config, tokenizer) if _first() else None
    write_tensors(drafts, heads, lambda name: _gathered({name: state[name]}).values(), file_bytes)
    if drafts is not None:
        drafts.publish()


def begin_model(directory: str | Path, config: ModelConfig, tokenizer: Tokenizer | None) -> Drafts:
    """The drafts of a model directory with all but its tensors; `publish` puts it in place."""
    drafts = Drafts(Path(directory))
    drafts.text("config.json", json.dumps(config_to_dict(config), indent=2) + "\n")
    if tokenizer is not None:
        files = tokenizer.files()
        for name, text in files.items():
            drafts.text(name, text)
        if TOKENIZER_CONFIG not in files:
            drafts.drop(TOKENIZER_CONFIG)  # of an earlier tokenizer: it would tell where documents end
    return drafts


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
    folder = Path(directory)
    config, stored = read_config(folder), StoredTensors(folder)
    if config.layers > len(stored.names()):
        raise ValueError(f"{stored.source} does not fit the model: {config.layers} layers need more tensors")
    model = GPT(config, device="meta")
    _check_fit(model.state_dict(), stored)  # before memory is taken for what a wrong config asks for
    kind = STORED_DTYPES[stored.kind("embed.weight")] if dtype is None else dtype
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != kind and stored_dtype(_role(module, name), kind) == kind:
                setattr(module, name, nn.Parameter(parameter.to(kind)))
    model.to_empty(device=device)
    _read(stored, model)
    return model


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is stored as in a model of `dtype`: router weights and selection biases keep fp32."""
    return torch.float32 if ".gate." in f".{name}" else dtype


def _role(module: nn.Module, name: str) -> str:
    return f"gate.{name}" if type(module).__name__ == "Gate" else name


def load_weights(directory: str | Path, model: nn.Module) -> None:
    """Reads a directory's tensors into a materialised model; of a parallelized one each rank reads its shard alone.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: tensors missing, unknown or of another shape or kind: all of them in one message, and nothing is
            read.
    """
    stored = StoredTensors(Path(directory))
    _check_fit(model.state_dict(), stored)
    _read(stored, model)


def _check_fit(wanted: dict[str, Tensor], stored: StoredTensors) -> None:
    shapes = {name: stored.shape(name) for name in stored.names()}
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in wanted]
    for name, tensor in wanted.items():
        if name in shapes and shapes[name] != tuple(tensor.shape):
            problems.append(f"{name} has shape {list(shapes[name])}, expected {list(tensor.shape)}")
        elif name in shapes and stored.kind(name) not in STORED_DTYPES:
            problems.append(f"{name} is stored as {stored.kind(name)}, expected one of {', '.join(STORED_DTYPES)}")
    if problems:
        raise ValueError(f"{stored.source} does not fit the model: " + "; ".join(problems))


@torch.no_grad()
def _read(stored: StoredTensors, model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        local_part(tensor).copy_(stored.read(name, local_box(tensor)))
