"""A model directory as the start of a run: its settings, its weights, and data that speaks its tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..models.config import ModelConfig
from ..models.tokenizer import vocabulary
from ..models.weights import read_config
from .config import DataConfig
from .export import tokenizer_path
from .manifest import first_difference


def settings(directory: str) -> ModelConfig:
    """The model that a run on `directory` trains.

    Raises:
        FileNotFoundError, ValueError: it is no model directory, or one of another kind.
    """
    return read_config(directory)


def refuse_other(directory: str, there: ModelConfig, here: ModelConfig) -> None:
    """Settings that were given beside a directory may not make another model of it.

    Raises:
        ValueError: one does.
    """
    found = first_difference(dataclasses.asdict(there), dataclasses.asdict(here))
    speeds = there.moe.gate.bias_update, here.moe.gate.bias_update
    if found is None and bool(speeds[0]) != bool(speeds[1]):  # it decides whether there is a bias
        found = "moe.gate.bias_update", *speeds
    if found is not None:
        raise ValueError(
            f"the model of --init {directory} has model.{found[0]} {found[1]}, but {found[2]} was given: leave the "
            "option out, or start from another model"
        )


def same_tokens(directory: str, data: DataConfig) -> None:
    """The tokenizer that the data was made with, as far as it is known, must be the model's.

    Raises:
        ValueError: a token of the data means another one to the model.
    """
    path, own = tokenizer_path(data), Path(directory) / "tokenizer.json"
    if not (data.train and path.exists() and own.exists()):
        return
    ids = vocabulary(own)
    for token, number in vocabulary(path).items():
        if ids.get(token) != number:
            there = f"{token!r} is {number} in {path} and {ids.get(token, 'not there')} in {own}"
            raise ValueError(
                f"the data was made with another tokenizer than the model of --init {directory}: {there}; "
                f"prepare the data with --tokenizer {own}"
            )
