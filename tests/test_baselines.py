"""N-gram baselines against sources whose entropy is known, and the quickstart's corpus."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from coterie.train.baselines import NGrams, baselines
from coterie.train.corpus import stdlib_corpus, write_corpus


def _markov(rng: np.random.Generator, order: int, vocab: int, length: int) -> tuple[np.ndarray, float]:
    """A stream whose next token depends on the last `order` tokens, and its conditional entropy on itself."""
    table = rng.dirichlet(np.full(vocab, 0.3), size=vocab**order)
    cumulative, draws = table.cumsum(axis=1), rng.random(length)
    tokens, state, nats = np.zeros(length, np.int64), 0, 0.0
    for i in range(length):
        token = min(int(np.searchsorted(cumulative[state], draws[i])), vocab - 1)
        nats -= np.log(table[state, token])
        tokens[i] = token
        state = (state * vocab + token) % vocab**order
    return tokens, nats / length


def test_losses_reach_the_entropy_of_the_source() -> None:
    rng = np.random.default_rng(3)
    tokens, entropy = _markov(rng, 1, 7, 60_000)
    result = baselines(tokens[:50_000], tokens[50_000:])
    assert result.bigram == pytest.approx(entropy, abs=0.03)
    assert result.trigram == pytest.approx(entropy, abs=0.03)
    counts = np.bincount(tokens[:50_000], minlength=7) / 50_000
    assert result.unigram == pytest.approx(-np.log(counts[tokens[50_002:]]).mean(), abs=2e-3)
    tokens, entropy = _markov(rng, 2, 5, 60_000)
    result = baselines(tokens[:50_000], tokens[50_000:])
    assert result.trigram == pytest.approx(entropy, abs=0.04)
    assert result.trigram < result.bigram - 0.1


def test_probabilities_sum_to_one() -> None:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 9, 2000)
    tokens = tokens[tokens != 4]  # one token that training never saw
    model = NGrams(tokens, 11)
    for context in ([0, 1], [4, 2], [8, 8], [10, 10]):
        total = sum(model.probabilities(np.array([*context, token])) for token in range(11))
        np.testing.assert_allclose(np.asarray(total)[:, 0], 1.0, rtol=1e-12)


def test_unseen_tokens_cost_a_finite_loss() -> None:
    result = baselines(np.tile(np.arange(5), 100), np.array([7, 6, 7, 7, 0, 1]), vocab_size=8)
    assert np.isfinite(result).all()
    with pytest.raises(ValueError, match="too few to fit"):
        baselines(np.arange(20), np.arange(20))
    with pytest.raises(ValueError, match="validation tokens"):
        baselines(np.arange(200), np.arange(2))


@pytest.mark.slow
def test_a_million_tokens_take_seconds() -> None:
    rng = np.random.default_rng(1)
    tokens = np.minimum(rng.zipf(1.2, 1_000_000), 4096) - 1
    start = time.process_time()
    baselines(tokens, tokens[:100_000], vocab_size=4096)
    assert time.process_time() - start < 6


def test_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = stdlib_corpus(size=2_000_000), stdlib_corpus(size=2_000_000)
    assert first == second
    assert not set(first.train_names) & set(first.valid_names)
    assert 1_900_000 < sum(len(t.encode()) for t in first.train + first.valid) < 4_000_000
    larger = stdlib_corpus(size=3_000_000)
    assert set(first.valid_names) <= set(larger.valid_names), "a held-out file stays held out"
    train, valid = write_corpus(tmp_path / "corpus", first)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    assert [r["text"] for r in rows] == first.train
    assert len(valid.read_text().splitlines()) == len(first.valid)


def test_corpus_leaves_out_foreign_and_broken_files(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text("y = 1\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "bad.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "test" / "good.py").write_text("t = 1\n")
    (tmp_path / "empty.py").write_text("")
    corpus = stdlib_corpus(root=tmp_path)
    names = set(corpus.train_names + corpus.valid_names)
    assert names == {f"m{i}.py" for i in range(200)} | {"test/good.py"}
    small = stdlib_corpus(size=500, root=tmp_path)
    assert "test/good.py" not in small.train_names + small.valid_names, "tests come last"
    with pytest.raises(FileNotFoundError, match="too few Python sources"):
        stdlib_corpus(root=tmp_path / "site-packages")
