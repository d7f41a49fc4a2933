"""config.json of our own models: the fields of `ModelConfig`, checked one by one."""

from __future__ import annotations

import dataclasses
import json
from types import UnionType
from typing import Any, get_args, get_type_hints

from .config import ModelConfig

MODEL_TYPE = "coterie"


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
        elif (inner := _dataclass(hint)) is not None and isinstance(value, dict):
            values[name] = _build(inner, value, f"{prefix}{name}.", problems)
        elif not _fits(hint, value):
            problems.append(f"{prefix}{name} is {value!r}, expected {getattr(hint, '__name__', hint)}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    lacking = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING and f.name not in data]
    problems += [f"{prefix.removesuffix('.')} lacks {name}" for name in lacking]
    return None if problems else kind(**values)


def _dataclass(hint: Any) -> type | None:
    """The dataclass that a field holds, perhaps or None."""
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)  # type: ignore[return-value]


def _fits(hint: Any, value: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(part, value) for part in get_args(hint))
    if isinstance(hint, type) and not get_args(hint):
        numbers = (int, float) if hint is float else hint
        return isinstance(value, numbers) and (hint is bool or not isinstance(value, bool))
    if getattr(hint, "__origin__", None) is tuple:
        return isinstance(value, list) and all(_fits(get_args(hint)[0], item) for item in value)
    return value in get_args(hint)  # a Literal
