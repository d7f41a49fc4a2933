"""Models as directories: config.json, model*.safetensors, tokenizer.json. Nothing here can run code from a file.

Tensors carry the names of the model's parameters and buffers; a tied head is not written twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel.tensor import is_cut, local_part
from .config import ModelConfig
from .config_file import MODEL_TYPE, config_to_dict
from .files import is_there, read_json
from .gpt import GPT
from .hf import FAMILIES, config_of, inward, outline, shapes_of
from .parts import Source, fill
from .shards import local_box
from .stored import StoredTensors
from .tensor_files import FILE_BYTES, KINDS, WORDS, Drafts, Head, write_tensors
from .tokenizer import TOKENIZER_CONFIG, Tokenizer


def read_config(directory: str | Path) -> ModelConfig:
    """The config of a model directory, ours or one in Hugging Face's layout (`hf.FAMILIES`).

    Raises:
        FileNotFoundError: no config.json.
        ValueError: it is damaged, or asks for what coterie lacks.
    """
    return config_of(_config_data(Path(directory)))


def _config_data(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not is_there(file):
        raise FileNotFoundError(f"{folder} is not a model directory: it has no config.json")
    return read_json(file)


def open_model(directory: str | Path) -> tuple[ModelConfig, Source]:
    """The config and the tensors, under our names, of a model directory of either kind. No tensor is read yet.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: config or weights do not fit; every wrong tensor is named.
    """
    folder = Path(directory)
    data = _config_data(folder)
    config, stored = config_of(data), StoredTensors(folder)
    family = FAMILIES.get(data["model_type"])
    if family is not None:
        return config, inward(family, config, stored)
    if config.layers > len(stored.names()):
        raise ValueError(f"{stored.source} does not fit the model: {config.layers} layers need more tensors")
    _check_fit(shapes_of(config), stored)
    return config, stored


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, an empty dict elsewhere. Every rank must call it: shards are gathered
    one tensor at a time, so a rank never holds more than one whole tensor beside its shards."""
    return _gathered(model.state_dict())


@torch.no_grad()
def _gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_cut(tensor) else tensor.detach()  # type: ignore[attr-defined]
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


def load_model(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    lay: Callable[[GPT], object] | None = None,
) -> GPT:
    """Builds the model of a directory on one device.

    Args:
        directory: as `save_model` writes it, or of another project (`hf.FAMILIES`).
        device: where the parameters go.
        dtype: of the matrices (the router stays in fp32); None: as stored.
        lay: cuts the model over ranks, before it takes memory; then each rank reads its part.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: config or weights do not fit; every wrong tensor is named.
    """
    config, stored = open_model(directory)  # before memory is taken for what a wrong config asks for
    model = outline(config)
    kind = stored.dtype("embed.weight") if dtype is None else dtype
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != kind and stored_dtype(_role(module, name), kind) == kind:
                setattr(module, name, nn.Parameter(parameter.to(kind)))
    if lay is not None:
        lay(model)
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
    folder = Path(directory)
    ours = not (folder / "config.json").exists() or _config_data(folder).get("model_type") == MODEL_TYPE
    stored = StoredTensors(folder) if ours else open_model(folder)[1]
    _check_fit({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, stored)
    _read(stored, model)


def _check_fit(wanted: Mapping[str, tuple[int, ...]], stored: Source) -> None:
    shapes = {name: stored.shape(name) for name in stored.names()}
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in wanted]
    for name, shape in wanted.items():
        if name in shapes and shapes[name] != shape:
            problems.append(f"{name} has shape {list(shapes[name])}, expected {list(shape)}")
        elif name in shapes and stored.dtype(name) not in KINDS:
            kind = WORDS.get(stored.dtype(name))
            problems.append(f"{name} is stored as {kind}, expected one of {', '.join(KINDS.values())}")
    if problems:
        raise ValueError(f"{stored.source} does not fit the model: " + "; ".join(problems))


@torch.no_grad()
def _read(stored: Source, model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        fill(stored, local_part(tensor), name, local_box(tensor))
