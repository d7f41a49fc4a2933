"""From tensors, wherever they are, to a model directory: ours, or one that other programs open."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .config import ModelConfig
from .config_file import MODEL_TYPE, config_to_dict
from .files import TOKENIZER_BYTES, is_there, open_checked, parse_json, read_json
from .hf import FAMILIES, outward, shapes_of, upstream
from .hf_family import Family
from .parts import Box, Source, pieces
from .tensor_files import Drafts, Head, has_weights, write_tensors
from .tokenizer import Tokenizer
from .weights import open_model, stored_dtype

Kind = Literal["coterie", "hf"]
Width = Literal["keep", "float32", "bfloat16"]
PIECE = 2**22
"""Bytes that are read at a time, or one row of a tensor's first axis if that is more."""
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
"""What lies beside a model's tensors and belongs to it: the tokenizer, its chat template, how to generate."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_UNITS = {"": 1, **{f"{u}{i}": (1024 if i else 1000) ** p for p, u in enumerate("kmgt", 1) for i in ("", "i")}}


class Model(NamedTuple):
    """A model that is read when it is written."""

    config: ModelConfig
    tensors: Source
    """Under our names."""
    beside: Mapping[str, bytes]
    """Contents of `BESIDE`."""
    tokenizer: Tokenizer | None
    check: Callable[[], None] = lambda: None
    """Called when all tensors were read and nothing is in place yet; it raises where they were not right."""


class Order(NamedTuple):
    """How a model is to be written. `ordered` makes one from a person's words."""

    to: Kind
    dtype: torch.dtype | None
    """Of the matrices; routers stay in fp32; None: all as it is stored."""
    file_bytes: int


def ordered(to: str, dtype: str, max_file_size: str, output: Path, force: bool) -> Order:
    """The order, where it can be carried out.

    Raises:
        ValueError: a word that is none of ours, a size that is none, or an output that must not be written over.
    """
    for what, word, known in (("to", to, get_args(Kind)), ("dtype", dtype, get_args(Width))):
        if word not in known:
            raise ValueError(f"{what} {word!r} is not one of {', '.join(known)}")
    order = Order(to, None if dtype == "keep" else getattr(torch, dtype), parse_bytes(max_file_size))  # type: ignore[arg-type]
    empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not empty and not force:
        raise ValueError(f"{output} exists: give another output, or force to replace the model in it")
    if not empty and not has_weights(output):
        raise ValueError(f"{output} holds no model that could be replaced: give another output")
    return order


def parse_bytes(text: str) -> int:
    """Bytes of "5GB", "500 MB", "1.5gib" or "1000000".

    Raises:
        ValueError: it is no size, or none above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size: give a number of bytes, or one with KB, MB, GB, TB, KiB, MiB, ...")
    return size


def model_of(folder: Path) -> Model:
    """The model of a directory of either kind.

    Raises:
        FileNotFoundError, ValueError: as `open_model`; or a file beside it is damaged.
    """
    config, tensors = open_model(folder)
    beside: dict[str, bytes] = {}
    for name in filter(lambda name: is_there(folder / name), BESIDE):
        with open_checked(folder / name, TOKENIZER_BYTES) as opened:
            beside[name] = opened.read()
    told, generation = read_json(folder / "config.json"), _generation(beside, str(folder))
    ids = {name: told[name] for name in _IDS if told.get(name) is not None and generation.get(name) is None}
    if ids:  # our config.json has no place for them
        beside["generation_config.json"] = _text(generation | ids)
    return Model(config, tensors, beside, Tokenizer(folder) if "tokenizer.json" in beside else None)


def write(output: Path, model: Model, order: Order) -> None:
    """Writes a model directory, piece by piece: no more of a tensor is in memory than `PIECE`, or than the one
    tensor of theirs that parts of ours make up.

    Raises:
        ValueError, OSError: what reading or writing meets, a full disk too; `output` is as it was.
    """
    family = upstream(model.config) if order.to == "hf" else None
    source = model.tensors if order.dtype is None else _Cast(model.tensors, order.dtype)
    beside = dict(model.beside)
    if order.to == "hf":
        beside |= _told(model)
    config = config_to_dict(model.config)
    if family is not None:
        config = _their_config(family, model.config, source.dtype("embed.weight"), beside)
        source = outward(family, model.config, source)
    names = list(shapes_of(model.config)) if family is None else source.names()
    heads = {name: Head(source.dtype(name), source.shape(name)) for name in names}
    made = not output.exists()
    drafts = Drafts(output)
    try:
        drafts.text("config.json", json.dumps(config, indent=2) + "\n")
        for name, content in beside.items():
            drafts.data(name, content)
        for name in set(BESIDE) - beside.keys():
            drafts.drop(name)  # of the model that was here before
        write_tensors(drafts, heads, lambda name: pieces(source, name, PIECE), order.file_bytes)
        model.check()
        drafts.publish()
    except BaseException:
        drafts.discard()
        if made:
            with contextlib.suppress(OSError):
                output.rmdir()
        raise


def how_to_open(output: Path) -> str:
    """One line for a person who will open a directory in transformers."""
    kind = read_json(output / "config.json")["model_type"]
    if kind == MODEL_TYPE:
        return (
            f"no architecture of transformers computes what {output} does: it has model_type {kind}, which "
            "AutoModelForCausalLM opens after `import coterie.models.transformers_model`"
        )
    return f"{output} is a {FAMILIES[kind].architecture}: AutoModelForCausalLM opens it without coterie"


class _Cast:
    """Tensors in another type; router weights and selection biases in fp32."""

    def __init__(self, tensors: Source, dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype
        self.source = tensors.source

    def names(self) -> list[str]:
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return stored_dtype(name, self._dtype)

    def read(self, name: str, box: Box) -> Tensor:
        return self._tensors.read(name, box).to(self.dtype(name))


def _their_config(
    family: Family, config: ModelConfig, dtype: torch.dtype, beside: Mapping[str, bytes]
) -> dict[str, Any]:
    generation = _generation(beside, "the model")
    ids = {name: generation[name] for name in _IDS if generation.get(name) is not None}
    return family.write(config) | {"dtype": str(dtype).removeprefix("torch.")} | ids


def _told(model: Model) -> dict[str, bytes]:
    """What transformers must be told of the end of a document, where nothing tells it yet."""
    files: dict[str, bytes] = {}
    if model.tokenizer is None:
        return files
    eos, generation = model.tokenizer.eos_id, _generation(model.beside, "the model")
    if generation.get("eos_token_id") is None:
        files["generation_config.json"] = _text(generation | {"eos_token_id": eos})
    if "tokenizer_config.json" not in model.beside:
        word = model.tokenizer.decode([eos], skip_special=False)
        files["tokenizer_config.json"] = _text({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": word})
    return files


def _generation(beside: Mapping[str, bytes], where: str) -> dict[str, Any]:
    return parse_json(beside.get("generation_config.json", b"{}"), f"generation_config.json of {where}")


def _text(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
