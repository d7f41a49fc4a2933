"""Model directories made to do harm: each is refused in one sentence, before memory is taken or anything waits."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie.models import files
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.tensor_files import HEADER_BYTES, StoredTensors, all_finite
from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.models.weights import load_model, read_config, save_model
from coterie.moe.config import MoEConfig

CONFIG = ModelConfig(
    vocab_size=300,
    max_positions=16,
    layers=2,
    dim=8,
    heads=2,
    hidden=12,
    experts=(0, 2),
    moe=MoEConfig(top_k=1, hidden=12),
)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = GPT(CONFIG)
    model.init_weights(1)
    save_model(tmp_path / "model", model, train_bpe(["some text"], 300))
    return tmp_path / "model"


@pytest.fixture
def split(folder: Path) -> Path:
    save_model(folder, load_model(folder), file_bytes=6000)
    assert (folder / INDEX).exists()
    return folder


def _refused(folder: Path, words: str | None) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def _tensor(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def _file(header: dict[str, Any] | bytes, data: int = 0, claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + bytes(data)


ONE = json.dumps(_tensor(0, 16, [4]))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "its header claims 0 bytes"),
        (b"123", "its header claims 3355185 bytes, and it can have 0 at most"),
        (_file({"a": _tensor(0, 16, [4])}, 16, claimed=0), "its header claims 0 bytes"),
        (_file({"a": _tensor(0, 16, [4])}, 16, claimed=2**64 - 1), "claims 18446744073709551615 bytes"),
        (_file({"a": _tensor(0, 16, [4])}, 16, claimed=2**31), "claims 2147483648 bytes"),
        (_file({"a": _tensor(0, 16, [4])}, 15), "file not fully covered"),
        (_file({"a": _tensor(0, 16, [4])}, 17), "file not fully covered"),
        (_file({"a": _tensor(0, 16, [4]), "b": _tensor(32, 48, [4])}, 48), "invalid offset"),
        (_file({"a": _tensor(0, 16, [4]), "b": _tensor(8, 24, [4])}, 24), "invalid offset"),
        (_file({"a": _tensor(16, 0, [4])}, 16), "is damaged"),
        (_file({"a": _tensor(-16, 0, [4])}, 16), "is damaged"),
        (_file({"a": _tensor(0, 16, [2**40, 2**40])}, 16), "overflow"),
        (_file({"a": _tensor(0, 0, [2**63, 0])}), "a has a shape that no tensor can have"),
        (_file({"a": _tensor(0, 4, [1] * 999)}, 4), "a has a shape that no tensor can have"),
        (_file(f'{{"a":{ONE},"a":{ONE}}}'.encode(), 16), "the key 'a' stands twice"),
        (_file({"a\n\x1b[2J": _tensor(0, 16, [4])}, 16), r"the key 'a\\n\\x1b\[2J' cannot be printed"),
        (_file(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "nested too deeply"),
        (_file(b'{"\xff": 1}'), "is damaged: its header is not JSON"),
        (_file({"a": 3}), "is damaged"),
        (_file(b"[1]"), "is damaged: its header holds no JSON object"),
    ],
)
def test_a_damaged_safetensors_file_is_refused(folder: Path, raw: bytes, words: str) -> None:
    (folder / "model.safetensors").write_bytes(raw)
    _refused(folder, words)


def test_a_file_cut_short_is_refused_at_every_length(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for length in range(0, len(whole), 101):
        (folder / "model.safetensors").write_bytes(whole[:length])
        _refused(folder, "is damaged")


@pytest.mark.parametrize(
    ("name", "size"),
    [("model.safetensors", 2**34), (INDEX, 2**30), ("config.json", 2**30), ("tokenizer.json", 2**30)],
)
def test_a_file_too_large_is_not_read(folder: Path, name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / name).open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(size)  # a hole: it takes no room on the disk

    def refuse(*_: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(files, "parse_json", refuse)
    read = {"tokenizer.json": Tokenizer, "config.json": read_config}.get(name, StoredTensors)
    with pytest.raises(ValueError, match=r"more than the|can have") as caught:
        read(folder)
    assert str(folder / name) in str(caught.value)
    assert HEADER_BYTES < 2**25


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link away", "link nowhere", "link to itself"])
def test_only_regular_files_of_the_folder_are_opened(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    file, elsewhere = folder / name, tmp_path / "elsewhere"
    if file.exists():
        file.rename(elsewhere)
    else:
        elsewhere.write_text("{}")
    {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "folder": file.mkdir,
        "link away": lambda: file.symlink_to(elsewhere),
        "link nowhere": lambda: file.symlink_to(tmp_path / "nothing"),
        "link to itself": lambda: file.symlink_to(file),
    }[kind]()
    if name == INDEX and kind.startswith("link ") and kind != "link away":
        assert load_model(folder).config == CONFIG  # there is no index
        return
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        (Tokenizer if name == "tokenizer.json" else load_model)(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_within_the_folder_and_into_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--org--name"
    snapshot = hub / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(hub / "blobs" / f"{i}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i}")
    assert load_model(snapshot).config == CONFIG
    assert Tokenizer(snapshot).vocab_size <= 300
    (snapshot / "here.json").write_text((snapshot / "config.json").read_text())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("here.json")
    assert read_config(snapshot) == CONFIG
    for place in ("../../blobs/../../secret", "../../refs/main", "/etc/hostname"):
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(place)
        (snapshot / place).resolve().parent.mkdir(exist_ok=True)
        if not (snapshot / place).exists():
            (snapshot / place).write_text("{}")
        with pytest.raises(ValueError, match="outside of its folder"):
            read_config(snapshot)


def test_a_folder_reached_through_a_link_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert load_model(tmp_path / "link").config == CONFIG


def test_a_file_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)  # root may read everything
    _refused(folder, r"config\.json cannot be read: Permission denied")


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/model.safetensors", "a/b.safetensors", "..", "b.bin", "a\n.safetensors"]
)
def test_an_index_leads_nowhere_else(split: Path, place: str) -> None:
    index = json.loads((split / INDEX).read_text())
    index["weight_map"]["embed.weight"] = place
    (split / INDEX).write_text(json.dumps(index))
    _refused(split, r"expected a \.safetensors file beside it")


def test_an_index_says_what_its_files_hold(split: Path) -> None:
    index = json.loads((split / INDEX).read_text())
    places = index["weight_map"]
    for changed, words in (
        (places | {"stranger": places["embed.weight"]}, "has 'stranger' in .*, which lacks it"),
        ({k: v for k, v in places.items() if k != "final_norm.weight"}, r"lacks final_norm\.weight"),
    ):
        (split / INDEX).write_text(json.dumps(index | {"weight_map": changed}))
        _refused(split, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
        ('{"norm_eps": NaN}', "NaN is no number in JSON"),
        ('{"norm_eps": -Infinity}', "-Infinity is no number in JSON"),
        ('{"norm_eps": 1e999}', "1e999 is no number that fits"),
        ('{"layers": 1' + "0" * 5000 + "}", "is no number that fits"),
        ('{"layers": 2, "layers": 3}', "the key 'layers' stands twice"),
        ('{"layers\\u000a": 2}', r"the key 'layers\\n' cannot be printed"),
        ("null", "holds no JSON object"),
        ("", "is not JSON"),
        ("\udcff", "is not JSON"),
    ],
)
def test_a_config_is_json_to_the_letter(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    _refused(folder, words)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 2**62},
        {"dim": 2**40, "hidden": 2**40, "heads": 2**20},
        {"dim": 10**12},
        {"layers": 10**9, "experts": []},
        {"max_positions": 2**62, "positions": "learned"},
        {"heads": 10**18, "head_dim": 2},
        {"experts": [0, 10**12]},
        {"layers": 2**63},
        {"head_dim": 2**61 * 2},
    ],
)
def test_a_config_that_asks_for_too_much_takes_no_memory(folder: Path, change: dict[str, Any]) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | change))
    tracemalloc.start()
    try:
        _refused(folder, None)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(folder: Path, dtype: torch.dtype, value: float) -> None:
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    state["final_norm.weight"][3] = value
    save_file(state, folder / "model.safetensors")
    _refused(folder, r"final_norm\.weight holds a NaN or an infinity")


def test_finite_says_so_of_every_kind() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert all_finite(torch.full((3, 5), 448.0).to(dtype))
        assert not all_finite(torch.tensor([1.0, torch.nan]).to(dtype))
    assert all_finite(torch.tensor(torch.finfo(torch.float32).max))
    assert all_finite(torch.zeros(0))
    assert all_finite(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 10**5,
        lambda text: text.replace('"merges": [', '"merges": [["\\u0001", "zz"],'),
        lambda text: "null",
    ],
)
def test_a_damaged_tokenizer_is_refused(folder: Path, change: Callable[[str], str]) -> None:
    text = (folder / "tokenizer.json").read_text()
    assert change(text) != text
    (folder / "tokenizer.json").write_text(change(text))
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json") as caught:
        Tokenizer(folder)
    assert "\n" not in str(caught.value)
