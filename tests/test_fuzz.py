"""Random damage to a model directory: it loads, or is refused in one line; nothing else, and no memory is taken."""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_hostile import CONFIG

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.hf import FAMILIES, outward
from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.models.weights import load_model, open_model, save_model
from coterie.moe.config import GateConfig, MoEConfig

ROOM = 2**29
"""Bytes of address space that a load may take."""

WORDS = [
    "null",
    "-1",
    "0",
    "1e30",
    "9" * 18,
    "9" * 40,
    '""',
    "[]",
    "{}",
    "true",
    "NaN",
    "[1,2]",
    '"layers"',
    "0.5",
    "\\",
]
KINDS = ["whole", "split", "mixtral", "gpt2"]
damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "insert", "value", "number", "swap"]),
        st.integers(0, 2**20),
        st.integers(0, 255),
        st.sampled_from(WORDS),
    ),
    min_size=1,
    max_size=3,
)


def _damaged(raw: bytes, kind: str, at: int, byte: int, word: str) -> bytes:
    """One damage. Most of a file is data, so half of the places lie in the first 2000 bytes."""
    at = at % max(1, len(raw) if at % 2 else min(len(raw), 2000))
    if kind == "flip":
        return raw[:at] + bytes([byte]) + raw[at + 1 :]
    if kind == "cut":
        return raw[:at]
    if kind == "drop":
        return raw[:at] + raw[at + 1 + byte % 16 :]
    if kind == "insert":
        return raw[:at] + word.encode() + raw[at:]
    if kind == "swap":
        return raw[:at] + raw[at + byte : at + 2 * byte] + raw[at : at + byte] + raw[at + 2 * byte :]
    digits = b"0123456789" if kind == "number" else b":"
    found = [i for i, c in enumerate(raw[:5000]) if c in digits]
    if not found:
        return raw
    start = found[at % len(found)] + (kind == "value")
    end = next((i for i in range(start, len(raw)) if raw[i] in b",}]"), len(raw))
    return raw[:start] + word.encode() + raw[end:]


def _line(read: Callable[[str], object], folder: str) -> str:
    try:
        read(folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def _files(config: ModelConfig, family: str | None, size: int) -> dict[str, bytes]:
    """The files of a directory: of ours, or of one of Hugging Face's architectures."""
    model = GPT(config)
    model.init_weights(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, model, train_bpe(["some text"], 300), file_bytes=size)
        if family is not None:
            theirs = outward(FAMILIES[family], config, open_model(folder)[1])
            state = {name: theirs.read(name, ()).contiguous() for name in theirs.names()}
            save_file(state, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(FAMILIES[family].write(config)))
        return {file.name: file.read_bytes() for file in folder.iterdir()}


MIXTRAL = replace(
    CONFIG, experts=(2, 2), kv_heads=1, moe=MoEConfig(top_k=2, hidden=12, gate=GateConfig(aux_over="model"))
)
GPT2 = replace(
    CONFIG,
    experts=(),
    moe=MoEConfig(),
    norm="layernorm",
    positions="learned",
    activation="gelu",
    attention_bias="all",
    mlp_bias=True,
)


@cache
def _models() -> dict[str, dict[str, bytes]]:
    return {
        "whole": _files(CONFIG, None, 10**9),
        "split": _files(CONFIG, None, 6000),
        "mixtral": _files(MIXTRAL, "mixtral", 10**9),
        "gpt2": _files(GPT2, "gpt2", 10**9),
    }


@pytest.fixture
def little_memory() -> Iterator[None]:
    _models()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("little_memory")
@given(which=st.sampled_from(KINDS), file=st.integers(0, 9), damage=damages)
@settings(max_examples=250, deadline=5000, suppress_health_check=list(HealthCheck))
def test_a_damaged_directory_loads_or_is_refused(
    which: str, file: int, damage: list[tuple[str, int, int, str]]
) -> None:
    raw = dict(_models()[which])
    name = sorted(raw)[file % len(raw)]
    for one in damage:
        raw[name] = _damaged(raw[name], *one)
    with tempfile.TemporaryDirectory() as folder:
        for other, content in raw.items():
            (Path(folder) / other).write_bytes(content)
        assert _line(load_model, folder).count("\n") == 0
        assert _line(Tokenizer, folder).count("\n") == 0


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x))


@given(which=st.sampled_from(KINDS), value=VALUES, data=st.data())
@settings(max_examples=200, deadline=5000, suppress_health_check=list(HealthCheck))
def test_any_value_in_a_config_loads_or_is_refused(which: str, value: object, data: st.DataObject) -> None:
    """Every key, at every depth, takes any JSON value."""
    files = _models()[which]
    config = json.loads(files["config.json"])
    table = config
    while True:
        key = data.draw(st.sampled_from(sorted(table)))
        if not isinstance(table[key], dict) or data.draw(st.booleans()):
            break
        table = table[key]
    table[key] = value
    with tempfile.TemporaryDirectory() as folder:
        for other, content in (files | {"config.json": json.dumps(config).encode()}).items():
            (Path(folder) / other).write_bytes(content)
        assert _line(load_model, folder).count("\n") == 0
