"""Data sets through megatron-core: contents, blends, splits, an order without ranks, and refusals."""

import logging
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.train.config import DataConfig
from coterie.train.data import IGNORE, batches, build_datasets
from coterie.train.token_files import largest_token, open_token_files, quiet_megatron, read_tokens

S = 7


def _write(prefix: Path, documents: list[list[int]], kind: type = np.uint16) -> str:
    builder = quiet_megatron("indexed_dataset").IndexedDatasetBuilder(f"{prefix}.bin", dtype=kind)
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def _numbered(count: int, length: int, first: int = 0) -> list[list[int]]:
    """Documents in which every token is met once."""
    return [list(range(first + i * length, first + (i + 1) * length)) for i in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return _write(tmp_path / "data", _numbered(100, 11))


def _build(config: DataConfig, train: int = 20, valid: int | None = 0, seed: int = 5, **more: Any) -> tuple[Any, Any]:
    return build_datasets(config, S, train, valid, seed, **more)


def test_samples_are_runs_of_the_shuffled_documents(data: str) -> None:
    train, valid = _build(DataConfig((data,), split="90,10"), valid=None)
    seen = []
    for dataset, low, high in ((train, 0, 990), (valid, 990, 1100)):
        rows = [dataset[i] for i in range(len(dataset))]
        for row in rows:
            tokens, labels = row["tokens"], row["labels"]
            assert torch.equal(tokens[1:], labels[:-1])
            inside = (tokens + 1) % 11 != 0  # not the last of its document
            assert torch.equal(labels[inside], tokens[inside] + 1)
        tokens = torch.cat([row["tokens"] for row in rows])
        assert low <= tokens.min()
        assert tokens.max() < high
        assert len(tokens) == len(tokens.unique()), "one epoch meets no token twice"
        seen.append(len(rows))
    assert seen == [(990 - 1) // S, (110 - 1) // S]


def test_order_depends_on_the_seed_and_the_position_alone(data: str) -> None:
    config = DataConfig((data,), split="100")
    train, _ = _build(config, 60)
    again, _ = _build(replace(config, cache=f"{data}.cache"), 60)
    other, _ = _build(config, 60, seed=6)

    def tokens(dataset: Any, start: int, batch: int, micro: int, world: int = 1) -> torch.Tensor:
        """Of 12 steps' ranks, put together in the order of the samples."""
        parts = []
        ranks = [batches(dataset, start, batch, micro, r, world) for r in range(world)]
        for _ in range(24 // batch):
            for r in range(world):
                parts += [b.tokens_BS for b in islice(ranks[r], batch // micro // world)]
        return torch.cat(parts)

    expected = torch.stack([train[i]["tokens"] for i in range(24)])
    for batch, micro, world in ((12, 12, 1), (12, 3, 1), (12, 3, 2), (12, 1, 4), (24, 2, 3), (4, 4, 1)):
        assert torch.equal(tokens(train, 0, batch, micro, world), expected), (batch, micro, world)
    assert torch.equal(tokens(train, 12, 12, 3, 2)[:12], expected[12:])
    assert torch.equal(tokens(again, 0, 12, 3), expected)
    assert not torch.equal(tokens(other, 0, 12, 3), expected)


def test_epochs_repeat_a_small_data_set(data: str) -> None:
    train, _ = _build(DataConfig((data,), split="100"), 400)
    assert len(train) >= 400
    tokens = torch.cat([train[i]["tokens"] for i in range(len(train))])
    counts = torch.bincount(tokens, minlength=1100)
    assert counts.min() >= 2
    assert counts.max() <= 3


def test_blends_follow_their_weights(tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a", _numbered(60, 9)), _write(tmp_path / "b", _numbered(30, 9, first=1000))
    v = _write(tmp_path / "v", _numbered(10, 9, first=3000))

    def share(config: DataConfig, samples: int) -> float:
        train, _ = _build(config, samples)
        rows = [train[i]["tokens"].min() >= 1000 for i in range(samples)]
        return float(torch.stack(rows).float().mean())

    assert share(DataConfig((a, b), (1, 4), valid=(v,)), 200) == pytest.approx(0.8, abs=0.02)
    assert share(DataConfig((a, b), split="100"), 300) == pytest.approx(1 / 3, abs=0.02)
    _, valid = _build(DataConfig((a, b), valid=(v, b), valid_weights=(3, 1)), valid=40)
    ours = torch.stack([valid[i]["tokens"].min() >= 3000 for i in range(40)])
    assert float(ours.float().mean()) == pytest.approx(0.75, abs=0.03)
    assert not torch.distributed.is_initialized()


def test_the_last_step_can_be_padded(data: str) -> None:
    _, valid = _build(DataConfig((data,), split="90,10"), valid=None)
    count = len(valid)
    assert count == 15
    assert sum(1 for _ in batches(valid, 0, 8, 2)) == 4
    parts = [list(batches(valid, 0, 8, 2, rank, 2, pad_last=True)) for rank in range(2)]
    assert [len(p) for p in parts] == [4, 4]
    flat = [b for part in parts for b in part]
    assert sum((b.targets_BS != IGNORE).sum().item() for b in flat) == count * S
    padded = [b for b in flat if b.valid_BS is not None]
    assert len(padded) == 1
    assert padded[0].valid_BS is not None
    assert padded[0].valid_BS.tolist() == [[True] * S, [False] * S]
    assert (padded[0].targets_BS[1] == IGNORE).all()
    with pytest.raises(ValueError, match="not a multiple of 3 a rank x 2 ranks"):
        next(batches(valid, 0, 8, 3, 0, 2))


def test_loss_after_a_document_can_be_masked(tmp_path: Path) -> None:
    train_bpe(["ab"], 257).save(tmp_path / "d.tokenizer.json")
    eos = Tokenizer(tmp_path / "d.tokenizer.json").eos_id
    prefix = _write(tmp_path / "d", [[20, 21, 22, eos] for _ in range(20)])
    config = DataConfig((prefix,), split="100", mask_eos=True)
    batch = next(batches(_build(config)[0], 0, 4, 4))
    assert ((batch.targets_BS == IGNORE) == (batch.tokens_BS == eos)).all()
    batch = next(batches(_build(replace(config, mask_eos=False))[0], 0, 4, 4))
    assert (batch.targets_BS != IGNORE).all()
    os.remove(tmp_path / "d.tokenizer.json")
    with pytest.raises(ValueError, match="mask_eos needs"):
        _build(config)


def test_a_half_written_cache_and_new_data_are_noticed(data: str, tmp_path: Path) -> None:
    config = DataConfig((data,), split="100", cache=str(tmp_path / "cache"))
    train, _ = _build(config)
    expected = train[0]["tokens"]
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "ready").unlink()
    for file in folder.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:40])
    train, _ = _build(config)
    assert torch.equal(train[0]["tokens"], expected)
    _write(Path(data), _numbered(30, 11, first=5000))
    train, _ = _build(config)
    assert min(int(train[i]["tokens"].min()) for i in range(len(train))) >= 5000


def test_vocabularies_must_fit(tmp_path: Path, data: str) -> None:
    _build(DataConfig((data,)), vocab_size=1100)
    with pytest.raises(ValueError, match=r"holds token 1,099 .* at least 1100"):
        _build(DataConfig((data,)), vocab_size=1099)
    dataset, _ = _build(DataConfig((data,), split="100"), 150)
    with pytest.raises(ValueError, match="vocabulary of 500"):
        list(batches(dataset, 0, 1, 1, vocab_size=500))
    last = next(i for i in range(len(dataset)) if dataset[i]["labels"][-1] > dataset[i]["tokens"].max())
    size = int(dataset[last]["labels"][-1])
    with pytest.raises(ValueError, match=f"holds token {size:,}"):  # a target alone
        next(batches([dataset[last]], 0, 1, 1, vocab_size=size))
    below = _write(tmp_path / "below", [[3, -2] * 50], np.int32)
    with pytest.raises(ValueError, match="holds token -2"):
        next(batches(_build(DataConfig((below,), split="100"))[0], 0, 1, 1, vocab_size=500))
    train_bpe(["ab"], 257).save(f"{data}.tokenizer.json")
    with pytest.raises(ValueError, match=r"has 257 tokens but the model's vocabulary 256: set model.vocab_size"):
        _build(DataConfig((data,)), vocab_size=256)
    other = _write(tmp_path / "other", _numbered(30, 11))
    train_bpe(["cd" * 9], 258).save(f"{other}.tokenizer.json")
    with pytest.raises(ValueError, match="two tokenizers cannot be mixed"):
        _build(DataConfig((data, other)))
    with pytest.raises(FileNotFoundError, match=r"no\.json does not exist"):
        _build(DataConfig((data,), tokenizer="no.json"))
    assert largest_token(open_token_files(other)) == 329
    assert read_tokens(other).tolist() == list(range(330))


def test_bad_data_is_refused(tmp_path: Path, data: str) -> None:
    def refused(kind: type[Exception], message: str, config: DataConfig, **more: Any) -> None:
        with pytest.raises(kind, match=message) as caught:
            _build(config, **more)
        assert "\n" not in str(caught.value)

    refused(ValueError, "no training data", DataConfig())
    refused(FileNotFoundError, r"no .*no.bin and no .*no.idx", DataConfig((str(tmp_path / "no"),)))
    refused(ValueError, f"give their common prefix {data}", DataConfig((f"{data}.bin",)))
    for missing, kept in ((".bin", ".idx"), (".idx", ".bin")):
        prefix = tmp_path / f"only{kept}"
        Path(f"{prefix}{kept}").write_bytes(Path(f"{data}{kept}").read_bytes())
        refused(FileNotFoundError, rf"only{kept}{missing} is missing, though", DataConfig((str(prefix),)))
    for name, bin_size, idx_size, message in (
        ("cutbin", 100, None, "cutbin.bin has 100 bytes but .* tells of 2,200"),
        ("cutidx", None, 90, "cutidx.idx is cut"),
        ("noidx", None, 5, "is not the index"),
    ):
        Path(f"{tmp_path / name}.bin").write_bytes(Path(f"{data}.bin").read_bytes()[:bin_size])
        Path(f"{tmp_path / name}.idx").write_bytes(Path(f"{data}.idx").read_bytes()[:idx_size])
        refused(ValueError, message, DataConfig((str(tmp_path / name),)))
    refused(ValueError, "holds no tokens", DataConfig((_write(tmp_path / "empty", []),)))
    short = _write(tmp_path / "short", [[1, 2, 3]])
    refused(
        ValueError, r"has 3 tokens for training, too few for one sample of 7 \+ 1", DataConfig((short,), split="1")
    )
    refused(
        ValueError,
        "1[0-9] tokens for validation|11 tokens for valid|0 tokens for valid",
        DataConfig((data,), split="9999,1"),
        valid=2,
    )
    for split in ("", "a,b", "0,1", "-1,2", "1,1,1,1"):
        refused(ValueError, "is not three shares", DataConfig((data,), split=split))
    refused(ValueError, "leaves no validation data", DataConfig((data,), split="100"), valid=1)
    refused(ValueError, "data.weights .* one positive number for each of 1", DataConfig((data,), weights=(1, 2)))
    refused(ValueError, "data.weights", DataConfig((data,), weights=(-1,)))


def test_megatron_is_quiet(data: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        _build(DataConfig((data,)), valid=4)
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith("megatron")]


def _rank(rank: int, world: int, prefix: str, cache: str) -> list[torch.Tensor]:
    config = DataConfig((prefix, prefix), (1, 2), split="90,10", cache=cache)
    train, valid = build_datasets(config, S, 40, 6, 5)
    return [
        *(b.tokens_BS for b in batches(train, 0, 8, 2, rank, world)),
        *(b.tokens_BS for b in batches(valid, 0, 6, 3)),
    ]


@pytest.mark.dist
def test_ranks_share_one_order(data: str, tmp_path: Path) -> None:
    ranks = run_ranks(_rank, 2, data, str(tmp_path / "shared"))
    alone = _rank(0, 1, data, str(tmp_path / "alone"))
    for step in range(5):
        both = [t for r in range(2) for t in ranks[r][2 * step : 2 * step + 2]]
        assert torch.equal(torch.cat(both), torch.cat(alone[4 * step : 4 * step + 4]))
    assert all(torch.equal(t, alone[-1]) for t in (ranks[0][-1], ranks[1][-1]))
