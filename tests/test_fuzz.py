"""Random damage to a model directory: it loads, or is refused in one line; nothing else, and no memory is taken."""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile import CONFIG

from coterie.models.gpt import GPT
from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.models.weights import load_model, save_model

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


@pytest.fixture(scope="module")
def models() -> dict[str, dict[str, bytes]]:
    """The files of directories, one in one piece and one in several."""
    model = GPT(CONFIG)
    model.init_weights(1)
    found = {}
    for name, size in {"whole": 10**9, "split": 6000}.items():
        with tempfile.TemporaryDirectory() as folder:
            save_model(folder, model, train_bpe(["some text"], 300), file_bytes=size)
            found[name] = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    return found


@pytest.fixture
def little_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("little_memory")
@given(which=st.sampled_from(["whole", "split"]), file=st.integers(0, 9), damage=damages)
@settings(max_examples=250, deadline=5000, suppress_health_check=list(HealthCheck))
def test_a_damaged_directory_loads_or_is_refused(
    models: dict[str, dict[str, bytes]], which: str, file: int, damage: list[tuple[str, int, int, str]]
) -> None:
    raw = dict(models[which])
    name = sorted(raw)[file % len(raw)]
    for one in damage:
        raw[name] = _damaged(raw[name], *one)
    with tempfile.TemporaryDirectory() as folder:
        for other, content in raw.items():
            (Path(folder) / other).write_bytes(content)
        assert _line(load_model, folder).count("\n") == 0
        assert _line(Tokenizer, folder).count("\n") == 0


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x)),
    st.data(),
)
@settings(max_examples=200, deadline=5000, suppress_health_check=list(HealthCheck))
def test_any_value_in_a_config_loads_or_is_refused(
    models: dict[str, dict[str, bytes]], value: object, data: st.DataObject
) -> None:
    """Every key, at every depth, takes any JSON value."""
    config = json.loads(models["whole"]["config.json"])
    table = config
    while True:
        key = data.draw(st.sampled_from(sorted(table)))
        if not isinstance(table[key], dict) or data.draw(st.booleans()):
            break
        table = table[key]
    table[key] = value
    with tempfile.TemporaryDirectory() as folder:
        for other, content in (models["whole"] | {"config.json": json.dumps(config).encode()}).items():
            (Path(folder) / other).write_bytes(content)
        assert _line(load_model, folder).count("\n") == 0
