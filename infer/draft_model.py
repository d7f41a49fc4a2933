"""A smaller model that guesses tokens ahead, such as a Mixture-of-Students of the one that it guesses for.

It keeps keys and values in a pool of its own whose first blocks bear the numbers of the main pool's, and follows
every step with the same slices and copies, so that prefixes, forks and preemption need nothing more. Guesses are
computed in blocks past those, which are worth nothing afterwards: the main blocks may be shared.

Q sequences, R of them in one pass, N guesses of one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..models.gpt import GPT
from ..models.tokenizer import Tokenizer
from .config import EngineConfig
from .drafts import Asked, Drafter, Guess, NgramDrafter, Pace
from .paged import KVPool, KVType, PagedCache, block_bytes
from .request import Key
from .sampling import Row, SamplingBatch, distribution, draw, is_greedy
from .speculative import draft_uniform
from .step import Slice, Step
from .truncate import ONE

_TOGETHER = 128  # sequences that are guessed for at a time


@dataclass
class _Way:
    """One sequence on its way through the guesses."""

    asked: Asked
    count: int
    blocks: tuple[int, ...]
    guesses: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    @property
    def piece(self) -> Slice:
        tokens = self.asked.tokens
        token = self.guesses[-1] if self.guesses else tokens[-1]
        return Slice(self.asked.key, len(tokens) - 1 + len(self.guesses), (token,), self.blocks, True)

    @property
    def row(self) -> Row:
        row, made = self.asked.row, self.guesses
        return replace(row, position=row.position + len(made), drafts=(*row.drafts, *made)) if made else row


class DraftModel:
    """Guesses with a model.

    Attributes:
        model: in eval mode, on the main model's device.
    """

    def __init__(
        self,
        model: GPT,
        *,
        vocabulary: int,
        blocks: int,
        block_size: int,
        max_model_len: int,
        draft_tokens: int,
        dtype: KVType = "auto",
    ) -> None:
        """
        Args:
            vocabulary, max_model_len: of the main model.
            blocks, block_size: of the main pool.
            draft_tokens: the most guesses that are ever asked for.
            dtype: of keys and values.

        Raises:
            ValueError: the draft model's vocabulary or positions do not fit.
        """
        check_draft(model, vocabulary=vocabulary, max_model_len=max_model_len)
        self.model, self._main, self._size = model.eval(), blocks, block_size
        self._each = scratch_blocks(block_size, draft_tokens)
        weight = model.embed.weight
        self._pool = KVPool(
            model.config,
            blocks + _TOGETHER * self._each,
            block_size,
            dtype=dtype,
            model_dtype=weight.dtype,
            device=weight.device,
        )
        self._cache, self._device = PagedCache(self._pool), weight.device
        self._most, self._paces = draft_tokens, dict[Key, Pace]()

    @torch.inference_mode()
    def follow(self, step: Step) -> None:
        """See `Drafter`."""
        self._pool.copy(step.copies)
        if step.slices:
            self._pass(step.slices, 0)

    def _pass(self, slices: Sequence[Slice], rows: int) -> Tensor | None:
        """Logits (R, V) of the last `rows` tokens of the slices; None for no rows."""
        tokens_1T, positions_1T = self._cache.begin(slices)
        total = tokens_1T.shape[1]
        rows_R = torch.arange(total - rows, total, device=self._device)
        logits_1RV = self.model(tokens_1T, positions_1T, cache=self._cache, rows_R=rows_R).logits_BSV
        return None if logits_1RV is None or not rows else logits_1RV[0]

    @torch.inference_mode()
    def propose(self, asked: Sequence[Asked]) -> list[Guess]:
        """See `Drafter`. Guesses are drawn with the sequences' own settings, and with random numbers that neither
        the tokens nor their acceptance use."""
        guesses = []
        for first in range(0, len(asked), _TOGETHER):
            ways = [self._begin(one, place) for place, one in enumerate(asked[first : first + _TOGETHER])]
            self._pool.copy([pair for way in ways for pair in self._copies(way)])
            going = ways
            while going := [way for way in going if len(way.guesses) < way.count]:
                going = self._extend(going)
            guesses += [self._end(way) for way in ways]
        return guesses

    def _begin(self, one: Asked, place: int) -> _Way:
        pace = self._paces.setdefault(one.key, Pace())
        first = self._main + place * self._each
        whole = (len(one.tokens) - 1) // self._size
        blocks = (*one.blocks[:whole], *range(first, first + self._each))
        return _Way(one, pace.count(one.tokens, min(one.count, self._most)), blocks)

    def _copies(self, way: _Way) -> list[tuple[int, int]]:
        """The filled part of a sequence's last block, to where the guesses go on from it."""
        whole, rest = divmod(len(way.asked.tokens) - 1, self._size)
        return [(way.asked.blocks[whole], way.blocks[whole])] if rest else []

    def _extend(self, ways: list[_Way]) -> list[_Way]:
        """One guess more for each; gives those that may have another."""
        batch = SamplingBatch([way.row for way in ways])
        logits_RV = self._pass([way.piece for way in ways], len(ways))
        assert logits_RV is not None
        probs_RV = distribution(logits_RV, batch)
        ids_R, _ = draw((probs_RV * ONE).round_(), draft_uniform(batch, self._device))
        fine = probs_RV.sum(dim=-1).isfinite().tolist()
        going = []
        for way, token, probs_V, ok in zip(ways, ids_R.tolist(), probs_RV, fine, strict=True):
            if ok:
                way.guesses.append(token)
                way.probs.append(probs_V)
                going.append(way)
        return going

    def _end(self, way: _Way) -> Guess:
        guessed = tuple(way.guesses)
        self._paces[way.asked.key].made(way.asked.tokens, guessed)
        # What is greedy was no random choice, and then the seed's own token decides.
        chance = guessed and not is_greedy(way.asked.row.settings)
        return Guess(guessed, torch.stack(way.probs) if chance else None)

    def forget(self, key: Key) -> None:
        """See `Drafter`."""
        self._paces.pop(key, None)


def scratch_blocks(block_size: int, draft_tokens: int) -> int:
    """Blocks that one sequence's guesses need: its last block may be full but for one token."""
    return -(-(block_size - 1 + draft_tokens) // block_size)


def check_draft(model: GPT, *, vocabulary: int, max_model_len: int) -> None:
    """Raises ValueError where a model cannot guess for one of `vocabulary` tokens."""
    config = model.config
    if config.vocab_size != vocabulary:
        raise ValueError(
            f"the draft model has {config.vocab_size} tokens and the model {vocabulary}: "
            "give one with the same tokenizer"
        )
    if config.max_positions < max_model_len:
        raise ValueError(
            f"the draft model has {config.max_positions} positions, but texts may have {max_model_len} tokens: "
            "lower max_model_len"
        )


def check_tokenizers(mine: Tokenizer | None, drafts: Tokenizer | None) -> None:
    """Raises ValueError where an id is one token to the model and another to the draft model. One without a tokenizer
    is taken at its vocabulary's size."""
    if mine is None or drafts is None:
        return
    ours, theirs = mine.vocabulary(), drafts.vocabulary()
    for token in sorted(ours.keys() | theirs.keys(), key=lambda token: (ours.get(token, theirs.get(token)), token)):
        if ours.get(token) != theirs.get(token):
            here, there = ours.get(token, "nothing"), theirs.get(token, "nothing")
            raise ValueError(
                f"the draft model has another tokenizer: {token[:40]!r} is {there} to it, and {here} to the model: "
                "give one with the same tokenizer"
            )


def kv_bytes(model: GPT, config: EngineConfig) -> int:
    """Bytes of one block of a draft model's keys and values."""
    return block_bytes(model.config, config.block_size, config.kv_dtype, model.embed.weight.dtype)


def make_drafter(
    config: EngineConfig, model: GPT | None, *, vocabulary: int, blocks: int, max_model_len: int
) -> Drafter | None:
    """What `EngineConfig.draft` asks for, or the draft model that was given; None for nothing. ValueError where they
    do not fit."""
    if model is not None:
        return DraftModel(
            model,
            vocabulary=vocabulary,
            blocks=blocks,
            block_size=config.block_size,
            max_model_len=max_model_len,
            draft_tokens=config.draft_tokens,
            dtype=config.kv_dtype,
        )
    if config.draft not in ("", "ngram"):
        raise ValueError(f"the draft model {config.draft} was not opened: give it as draft_model")
    return NgramDrafter() if config.draft else None
