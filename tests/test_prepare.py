"""Every kind of input gives the documents it should; every bad one gives one clear sentence and leaves nothing."""

import gzip
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.train import prepare as prepare_module
from coterie.train import sources
from coterie.train.prepare import BREAK, prepare
from coterie.train.sources import documents, find_sources, read_chunks
from coterie.train.token_files import quiet_megatron

TEXTS = ["one fish, two fish\n", "red fish\n\nblue fish été ☃\n", "a long tail of words " * 9]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    train_bpe(TEXTS * 5, 300).save(path)
    return path


def _read(prefix: Path) -> list[str]:
    """The texts of a pair of files as megatron-core reads them; each must end with the end-of-document token."""
    tokenizer = Tokenizer(f"{prefix}.tokenizer.json")
    data = quiet_megatron("indexed_dataset").IndexedDataset(str(prefix))
    assert list(data.document_indices) == list(range(len(data) + 1))
    rows = [data[i] for i in range(len(data))]
    assert all(row[-1] == tokenizer.eos_id for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


def _rows(texts: Sequence[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts))


def _stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))


def test_text_files_are_a_document_each(tmp_path: Path, vocabulary: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    result = prepare([tmp_path / f"{i}.txt" for i in (1, 0, 2)], tmp_path / "out" / "p", tokenizer=vocabulary)
    assert _read(result.prefix) == [TEXTS[1], TEXTS[0], TEXTS[2]]
    assert result.documents == 3
    assert result.bytes == sum(len(t.encode()) for t in TEXTS)
    assert result.tokens == len(np.fromfile(f"{result.prefix}.bin", np.uint16))
    assert sorted(os.listdir(tmp_path / "out")) == ["p.bin", "p.idx", "p.tokenizer.json"]


@pytest.mark.parametrize("chunk", [16, 1 << 20])
@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress], ids=["plain", "gzip"])
def test_lines_and_blank_lines_split_a_text(tmp_path: Path, monkeypatch: Any, chunk: int, pack: Any) -> None:
    monkeypatch.setattr(sources, "CHUNK", chunk)
    text = "first\r\nline two, longer than a chunk\n\n\n  \nthird part\n \nfourth\nend"
    (tmp_path / "a.txt").write_bytes(pack(("\ufeff" + text).encode()))

    def split(how: Any) -> list[str]:
        found = find_sources([tmp_path / "a.txt"], "text")
        return [d for c in read_chunks(found, "text", how) for d in documents(c, "text", how)]

    assert split("line") == [s for line in text.split("\n") if (s := line.rstrip("\r")).strip()]
    assert split("blank") == ["first\r\nline two, longer than a chunk", "third part", "fourth\nend"]
    assert split("file") == [text]


def test_folders_globs_and_kinds_mix(tmp_path: Path, vocabulary: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").write_bytes(b"\0")
    (folder / "a.jsonl").write_text(_rows(TEXTS[:2]) + "\n" + _rows(["", "  "]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(_rows(TEXTS[2:]).encode()))
    (folder / "deep" / "empty.txt").write_text("")
    (folder / "deep" / "c.txt").write_text("c")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row one", "row two"]}), folder / "deep" / "d.parquet")
    expected = [*TEXTS, "c", "row one", "row two"]
    assert _read(prepare([folder], folder / "out", tokenizer=vocabulary).prefix) == expected
    again = prepare([folder], folder / "out", tokenizer=vocabulary, force=True)
    assert _read(again.prefix) == expected, "our own outputs are no input"
    globbed = prepare([str(folder / "**" / "*.jsonl*")], tmp_path / "globbed", tokenizer=vocabulary)
    assert _read(globbed.prefix) == TEXTS


def test_a_chosen_field(tmp_path: Path, vocabulary: Path) -> None:
    (tmp_path / "a.jsonl").write_text(_rows(TEXTS, "body"))
    result = prepare([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer=vocabulary, field="body")
    assert _read(result.prefix) == TEXTS


@pytest.mark.parametrize("train", [False, True], ids=["load", "train"])
def test_standard_input(tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    options: dict[str, Any] = {"train_vocab": 270} if train else {"tokenizer": vocabulary}
    _stdin(monkeypatch, _rows(TEXTS).encode())
    assert _read(prepare(["-"], tmp_path / "rows", **options).prefix) == TEXTS
    _stdin(monkeypatch, TEXTS[1].encode())
    assert _read(prepare(["-"], tmp_path / "text", **options).prefix) == [TEXTS[1]]
    _stdin(monkeypatch, b"x\ny\n")
    assert _read(prepare(["-"], tmp_path / "lines", split="line", **options).prefix) == ["x", "y"]


def test_training_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 50)
    result = prepare([tmp_path / "a.txt"], tmp_path / "p", train_vocab=265)
    tokenizer = Tokenizer(f"{result.prefix}.tokenizer.json")
    assert tokenizer.vocab_size == result.vocab_size == 265
    assert len(tokenizer.encode("the cat")) < 6
    assert _read(result.prefix) == ["the cat sat on the mat\n" * 50]


@pytest.mark.dist
def test_any_number_of_workers_writes_the_same(tmp_path: Path, vocabulary: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sources, "CHUNK", 4096)
    monkeypatch.setattr(prepare_module, "CHUNK", 1)
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(32, 900, rng.integers(1, 300)))) for _ in range(300)]
    (tmp_path / "a.jsonl").write_text(_rows(texts))
    for workers in (1, 2):
        prepare([tmp_path / "a.jsonl"], tmp_path / f"w{workers}", tokenizer=vocabulary, workers=workers)
    assert (tmp_path / "w1.bin").read_bytes() == (tmp_path / "w2.bin").read_bytes()
    assert (tmp_path / "w1.idx").read_bytes() == (tmp_path / "w2.idx").read_bytes()
    (tmp_path / "a.jsonl").write_text(_rows(texts) + '{"text": 3}\n')
    with pytest.raises(ValueError, match=r'field "text" in line 301 of .*a.jsonl is int'):
        prepare([tmp_path / "a.jsonl"], tmp_path / "w3", tokenizer=vocabulary, workers=2)


def test_long_documents_are_cut_where_tokens_do_not_change(vocabulary: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(prepare_module, "LONG", 40)
    monkeypatch.setattr(prepare_module, "PIECE", 20)
    tokenizer = Tokenizer(vocabulary)
    text = "def f(x):\n    return x\n\n\nclass A:\n\tb = 1 \n  c\n" * 9 + "fish\n\n"
    pieces = list(prepare_module._pieces(text))
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert [i for p in pieces for i in tokenizer.encode(p)] == tokenizer.encode(text)
    assert BREAK.search("a\n\nb") is None


BAD = {
    "missing": ("nowhere.txt", None, FileNotFoundError, "nowhere.txt does not exist"),
    "no match": ("*.nothing", None, FileNotFoundError, "no file matches"),
    "empty": ("a.txt", b"", ValueError, "a.txt is empty"),
    "blank": ("a.txt", b" \n\n", ValueError, "no text in .*a.txt"),
    "binary": ("a.txt", b"text\0\1", ValueError, "looks binary"),
    "packed": ("a.zip", b"PK\3\4", ValueError, "unpack it"),
    "latin": ("a.txt", "été".encode("latin-1"), ValueError, r"not UTF-8 text \(byte 0xe9 at 0\)"),
    "latin late": ("a.txt", b"a" * 20000 + b"\xe9", ValueError, r"not UTF-8 text \(byte 0xe9 at 20000\)"),
    "cut gzip": ("a.gz", gzip.compress(os.urandom(30000))[:20000], ValueError, "binary|not UTF-8|damaged gzip"),
    "cut text gzip": ("a.gz", gzip.compress(_rows(TEXTS * 99).encode())[:-9], ValueError, "damaged gzip"),
    "not JSON": ("a.jsonl", b'{"text": "x"}\n{"text"\n', ValueError, r"line 2 of .*a.jsonl is not JSON"),
    "no object": ("a.jsonl", b"3\n", ValueError, "is a JSON int"),
    "array": ("a.json", b'[{"text": "x"}]', ValueError, "one JSON array"),
    "field": ("a.jsonl", b'{"body": "x"}\n', ValueError, 'the first row of .* no field "text": it has body'),
    "late field": ("a.jsonl", b'{"text": "x"}\n{"b": 1}\n', ValueError, 'line 2 of .* no field "text": it has b'),
    "no parquet": ("a.parquet", b"text", ValueError, "not a parquet file"),
    "cut parquet": ("a.parquet", b"PAR1text", ValueError, "damaged parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(tmp_path: Path, vocabulary: Path, case: str) -> None:
    name, data, kind, message = BAD[case]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(kind, match=message) as caught:
        prepare([tmp_path / name], tmp_path / "p", tokenizer=vocabulary)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_bad_parquet_fields(tmp_path: Path, vocabulary: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "text": ["x"], "gap": ["x"]}), tmp_path / "a.parquet")
    for field, message in (("body", "it has n, text, gap"), ("n", "is int64, not text")):
        with pytest.raises(ValueError, match=message):
            prepare([tmp_path / "a.parquet"], tmp_path / "p", tokenizer=vocabulary, field=field)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"row 2 of .*b.parquet has no text"):
        prepare([tmp_path / "b.parquet"], tmp_path / "p", tokenizer=vocabulary)


def test_bad_options_are_refused(tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    given: Any = ([tmp_path / "a.txt"], tmp_path / "p")
    with pytest.raises(ValueError, match="neither of tokenizer and train_vocab"):
        prepare(*given)
    with pytest.raises(ValueError, match="both of tokenizer and train_vocab"):
        prepare(*given, tokenizer=vocabulary, train_vocab=300)
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*no.json does not exist"):
        prepare(*given, tokenizer=tmp_path / "no.json")
    with pytest.raises(ValueError, match="too small"):
        prepare(*given, train_vocab=10)
    with pytest.raises(ValueError, match="give files"):
        prepare([], tmp_path / "p", tokenizer=vocabulary)
    with pytest.raises(ValueError, match="0 workers"):
        prepare(*given, tokenizer=vocabulary, workers=0)
    _stdin(monkeypatch, b"")
    with pytest.raises(ValueError, match="standard input is empty"):
        prepare(["-"], tmp_path / "p", tokenizer=vocabulary)
    assert sorted(os.listdir(tmp_path)) == ["a.txt"]


def test_old_outputs_survive(tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("fish")
    (tmp_path / "b.txt").write_text("x" * 9000 + "\n")
    prefix = prepare([tmp_path / "a.txt"], tmp_path / "p", tokenizer=vocabulary).prefix
    with pytest.raises(FileExistsError, match="force"):
        prepare([tmp_path / "b.txt"], prefix, tokenizer=vocabulary)
    (tmp_path / "c.txt").write_bytes(b"y" * 9000 + b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare([tmp_path / "b.txt", tmp_path / "c.txt"], prefix, tokenizer=vocabulary, force=True)
    assert _read(prefix) == ["fish"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder.add_document", full)
        with pytest.raises(OSError, match=r"could not write .*p.bin: No space left"):
            prepare([tmp_path / "b.txt"], prefix, tokenizer=vocabulary, force=True)
    assert _read(prefix) == ["fish"]
    prepare([tmp_path / "b.txt"], prefix, tokenizer=vocabulary, force=True)
    assert _read(prefix) == ["x" * 9000 + "\n"]
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt", "c.txt", "p.bin", "p.idx", "p.tokenizer.json"]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path, vocabulary: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "ok \ud83d\ude00 bad \ud83d."}' + "\n")
    assert _read(prepare([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer=vocabulary).prefix) == [
        "ok 😀 bad \ufffd."
    ]


def test_a_special_token_in_a_text_is_text(tmp_path: Path, vocabulary: Path) -> None:
    """A document that spells the end-of-document token does not end there."""
    text = "before<|endoftext|>after"
    (tmp_path / "a.txt").write_text(text)
    result = prepare([tmp_path / "a.txt"], tmp_path / "p", tokenizer=vocabulary)
    tokenizer = Tokenizer(f"{result.prefix}.tokenizer.json")
    ids = np.fromfile(f"{result.prefix}.bin", np.uint16).tolist()
    assert ids.count(tokenizer.eos_id) == 1
    assert ids[-1] == tokenizer.eos_id
    assert _read(result.prefix) == [text]
    (tmp_path / "b.txt").write_text(text * 50)
    trained = prepare([tmp_path / "b.txt"], tmp_path / "q", train_vocab=300)
    assert _read(trained.prefix) == [text * 50]


def test_documents_end_with_the_token_that_training_will_look_for(tmp_path: Path, vocabulary: Path) -> None:
    """The tokenizer beside the output comes without its folder's tokenizer_config.json, which may name another."""
    folder = tmp_path / "model"
    folder.mkdir()
    inner = json.loads(vocabulary.read_text())
    extra = dict(inner["added_tokens"][0], id=len(inner["model"]["vocab"]), content="<stop>")
    inner["added_tokens"].append(extra)
    (folder / "tokenizer.json").write_text(json.dumps(inner))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    (tmp_path / "a.txt").write_text("one fish")
    assert _read(prepare([tmp_path / "a.txt"], tmp_path / "p", tokenizer=folder).prefix) == ["one fish"]
    inner["added_tokens"] = [extra]
    del inner["model"]["vocab"]["<|endoftext|>"]
    (folder / "tokenizer.json").write_text(json.dumps(inner))
    with pytest.raises(ValueError, match="none of the usual end-of-document tokens"):
        prepare([tmp_path / "a.txt"], tmp_path / "q", tokenizer=folder)
    assert not list(tmp_path.glob("q*"))
