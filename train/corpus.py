"""The quickstart's corpus: the sources of Python's own standard library, which every machine already has."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

# Character tables and one giant help text: near copies of each other, so a held-out one would be no test.
TABLES = {"encodings", "pydoc_data"}
TESTS = {"test", "tests", "idle_test"}
FOREIGN = {"site-packages", "dist-packages", "__pycache__"}


class Corpus(NamedTuple):
    """Texts of whole files, each list in the order of the files' names."""

    train: list[str]
    valid: list[str]
    train_names: list[str]
    valid_names: list[str]


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _read(path: Path) -> str:
    """The file's text, or "" where it cannot be read as UTF-8 (a few test files are broken on purpose)."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _list(root: Path) -> tuple[list[str], list[str]]:
    """Relative names of (library files, files of its test suites), sorted."""
    library, tests = [], []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - FOREIGN - TABLES)
        parts = Path(folder).relative_to(root).parts
        names = [Path(*parts, f).as_posix() for f in files if f.endswith(".py")]
        (tests if TESTS & set(parts) else library).extend(names)
    return sorted(library), sorted(tests)


def stdlib_corpus(size: int = 16_000_000, valid_share: float = 0.03, root: Path | None = None) -> Corpus:
    """All sources of the library, then files of its test suites until there are `size` bytes.

    A file is held out for validation when a hash of its name says so: the choice depends on nothing else.

    Args:
        size: Bytes of text to aim at. The library alone has about 9 million.
        valid_share: Share of the files that is held out.
        root: Folder of the sources; None: this Python's standard library.

    Raises:
        FileNotFoundError: The folder has no readable sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    library, tests = _list(root)
    total, texts = 0, {}
    for name in sorted(library, key=_digest) + sorted(tests, key=_digest):
        if total >= size:
            break
        text = _read(root / name)
        if text.strip():
            texts[name] = text
            total += len(text.encode())
    held = {name for name in texts if _digest("valid:" + name) < valid_share * 2**64}
    if not held or len(held) == len(texts):
        raise FileNotFoundError(f"{root} has too few Python sources ({len(texts)}) to train on: give another folder")
    train, valid = sorted(set(texts) - held), sorted(held)
    return Corpus([texts[n] for n in train], [texts[n] for n in valid], train, valid)


def write_corpus(folder: Path, corpus: Corpus) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `valid.jsonl`, one {"text", "name"} a line, for `prepare`; returns the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "valid.jsonl"
    for path, texts, names in zip(
        paths, (corpus.train, corpus.valid), (corpus.train_names, corpus.valid_names), strict=True
    ):
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            for name, text in zip(names, texts, strict=True):
                file.write(json.dumps({"text": text, "name": name}) + "\n")
        partial.replace(path)
    return paths
