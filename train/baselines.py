"""What counting alone reaches: validation losses of n-gram models (n = 1, 2, 3) fitted on the training tokens."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .token_files import read_tokens

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
ORDERS = 3
BUCKETS = 24
EM_STEPS = 50


class Baselines(NamedTuple):
    """Mean negative log-likelihood, in nats per token."""

    unigram: float
    bigram: float
    trigram: float


class _Table:
    """Counts of the n-grams of a token stream; an n-gram is one number in base V, its oldest token first."""

    def __init__(self, tokens_T: Ints, order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.grams, self.counts = np.unique(self.keys(tokens_T), return_counts=True)
        contexts = self.grams // vocab_size
        starts = np.flatnonzero(np.diff(contexts, prepend=-1))
        self.contexts = contexts[starts]
        self.totals = np.add.reduceat(self.counts, starts)

    def keys(self, tokens_T: Ints) -> Ints:
        """The n-gram that ends at each of the tokens ORDERS-1, ORDERS, ...: the same targets for every order."""
        count = len(tokens_T) - ORDERS + 1
        keys = np.zeros(count, np.int64)
        for back in range(self.order - 1, -1, -1):
            start = ORDERS - 1 - back
            keys = keys * self.vocab_size + tokens_T[start : start + count]
        return keys

    def look_up(self, keys: Ints) -> tuple[Floats, Ints]:
        """(maximum-likelihood probability of the last token, how often its context was seen)."""
        seen = _find(self.grams, self.counts, keys)
        context = _find(self.contexts, self.totals, keys // self.vocab_size)
        return seen / np.maximum(context, 1), context


def _find(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def _bucket(context: Ints) -> Ints:
    """0 for a context never seen, else 1 + log2 of its count: rare and frequent contexts earn different trust."""
    return np.minimum(np.frexp(context.astype(np.float64))[1], BUCKETS - 1).astype(np.int64)


class NGrams:
    """Jelinek-Mercer interpolation: p_n = w * ML_n + (1 - w) * p_(n-1), down to the uniform distribution, with one
    weight w per order and per bucket of the context's count (Chen and Goodman 1996, section 2.3)."""

    def __init__(self, tokens_T: Ints, vocab_size: int, held_share: float = 0.05) -> None:
        """Counts all tokens; fits the weights by EM on the last `held_share` of them with counts of the rest."""
        if len(tokens_T) < 100:
            raise ValueError(f"{len(tokens_T)} tokens are too few to fit n-grams on: give at least 100")
        if vocab_size**ORDERS >= 2**63:
            raise ValueError(f"a vocabulary of {vocab_size} tokens is too large for trigrams: the limit is 2097151")
        self.vocab_size = vocab_size
        cut = len(tokens_T) - max(ORDERS, int(held_share * len(tokens_T)))
        held_T = tokens_T[cut:]
        self.weights = np.zeros((ORDERS, BUCKETS))
        lower = np.full(len(held_T) - ORDERS + 1, 1 / vocab_size)
        for order in range(1, ORDERS + 1):
            table = _Table(tokens_T[:cut], order, vocab_size)
            likely, context = table.look_up(table.keys(held_T))
            bucket = _bucket(context)
            weights = np.full(BUCKETS, 0.5)
            weights[0] = 0.0
            size = np.bincount(bucket, minlength=BUCKETS)
            for _ in range(EM_STEPS):
                ours = weights[bucket] * likely
                share = ours / (ours + (1 - weights[bucket]) * lower)
                total = np.bincount(bucket, weights=share, minlength=BUCKETS)
                # Half a token of each side keeps a weight off 0 and 1, where one surprise would cost everything.
                weights[1:] = ((total + 0.5) / (size + 1))[1:]
            self.weights[order - 1] = weights
            lower = weights[bucket] * likely + (1 - weights[bucket]) * lower
        self.tables = [_Table(tokens_T, order, vocab_size) for order in range(1, ORDERS + 1)]

    def probabilities(self, tokens_T: Ints) -> Floats:
        """(ORDERS, T - 2): what each order gives to every token from the third on."""
        result, lower = [], np.full(len(tokens_T) - ORDERS + 1, 1 / self.vocab_size)
        for table, weights in zip(self.tables, self.weights, strict=True):
            likely, context = table.look_up(table.keys(tokens_T))
            weight = weights[_bucket(context)]
            lower = weight * likely + (1 - weight) * lower
            result.append(lower)
        return np.stack(result)


def baselines(
    train_tokens: Ints | str | Path, valid_tokens: Ints | str | Path, vocab_size: int | None = None
) -> Baselines:
    """Losses on the validation tokens of n-gram models fitted on the training tokens.

    Args:
        train_tokens: Token ids, or the prefix of a .bin/.idx pair.
        valid_tokens: The same; at least three tokens.
        vocab_size: None: the largest id + 1.

    Raises:
        ValueError: Too few tokens.
    """
    train_T = train_tokens if isinstance(train_tokens, np.ndarray) else read_tokens(train_tokens)
    valid_T = valid_tokens if isinstance(valid_tokens, np.ndarray) else read_tokens(valid_tokens)
    if len(valid_T) < ORDERS:
        raise ValueError(f"{len(valid_T)} validation tokens are too few: give at least {ORDERS}")
    train_T, valid_T = train_T.astype(np.int64), valid_T.astype(np.int64)
    vocab_size = vocab_size or int(max(train_T.max(initial=0), valid_T.max())) + 1
    losses = -np.log(NGrams(train_T, vocab_size).probabilities(valid_T)).mean(axis=1)
    return Baselines(*map(float, losses))
