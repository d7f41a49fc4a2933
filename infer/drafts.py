"""What guesses tokens ahead, for the model to check several at once: here by looking for repeats of the text so far.

Repeats: Saxena, "Prompt lookup decoding", 2023; Yang et al., arXiv 2304.04487. N guesses, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from .request import Key
from .sampling import Row
from .step import Step


class Guess(NamedTuple):
    """Tokens that may follow, N of them; none is a guess too. `probs_NV`: the distribution that each was drawn from;
    None: they are no random choice."""

    tokens: tuple[int, ...]
    probs_NV: Tensor | None


@dataclass(frozen=True, slots=True)
class Asked:
    """One sequence that guesses are wanted for."""

    key: Key
    tokens: Sequence[int]
    """All so far, prompt and text."""
    blocks: tuple[int, ...]
    """Of the keys and values of all tokens but the last, as in `Slice.blocks`."""
    count: int
    """Guesses wanted, at least 1."""
    row: Row
    """What decides the next token."""


class Drafter(Protocol):
    """Where guesses come from."""

    def follow(self, step: Step) -> None:
        """Before the model's pass: computes the same slices and copies, where it has keys and values of its own."""
        ...

    def propose(self, asked: Sequence[Asked]) -> list[Guess]:
        """At most `count` guesses for each."""
        ...

    def forget(self, key: Key) -> None:
        """The sequence has ended."""
        ...


class Pace:
    """How many guesses a sequence is worth: one more than were right the last time.

    Each guess costs the model a token, and in a model of experts the weights of those that it alone visits, so
    sequences whose guesses fail are guessed for less.
    """

    def __init__(self) -> None:
        self._most, self._at, self._guessed = 1 << 30, 0, ()

    def count(self, tokens: Sequence[int], wanted: int) -> int:
        """How many to make now, 1 to `wanted`, by what became of the last ones."""
        if self._guessed:
            right = 0
            for guess, token in zip(self._guessed, tokens[self._at :], strict=False):
                if guess != token:
                    break
                right += 1
            whole = right == len(self._guessed)
            self._most, self._guessed = (2 * right if whole else right + 1), ()
        return max(1, min(self._most, wanted))

    def made(self, tokens: Sequence[int], guessed: tuple[int, ...]) -> None:
        """What was guessed after `tokens`."""
        self._at, self._guessed = len(tokens), guessed


class _Index:
    """Where each run of a few tokens was last seen; only ends with a token after them are in it."""

    def __init__(self, sizes: range, window: int) -> None:
        self.sizes, self.window = sizes, window
        self.pace = Pace()
        self._ends: dict[tuple[int, ...], int] = {}
        self._seen = self._first = 0  # tokens [first, seen) have been looked at

    def update(self, tokens: Sequence[int]) -> None:
        """Takes in what is new: at most a window of tokens."""
        last = len(tokens) - 1
        if last < self._seen or last - self._first > 2 * self.window:  # older ones are forgotten all at once
            self._ends.clear()
            self._seen = self._first = max(0, last - self.window)
        for end in range(self._seen + 1, last + 1):
            for size in self.sizes:
                if end - size >= self._first:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._seen = max(self._seen, last)

    def find(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """What followed the longest end of the tokens the last time that it was seen."""
        for size in reversed(self.sizes):
            if size < len(tokens) and (end := self._ends.get(tuple(tokens[-size:]))) is not None:
                period = len(tokens) - end  # past the end of the text the guess goes on as it began
                return tuple(tokens[end + i % period] for i in range(count))
        return ()


class NgramDrafter:
    """Guesses that what followed the last few tokens before follows them again. It costs no model.

    Args:
        longest, shortest: tokens that must be the same, longest first.
        window: how many tokens back to look; also what bounds time and memory.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2, window: int = 8192) -> None:
        if not 1 <= shortest <= longest or window < longest:
            raise ValueError(f"runs of {shortest} to {longest} tokens in a window of {window} mean nothing")
        self._sizes, self._window = range(shortest, longest + 1), window
        self._indices: dict[Key, _Index] = {}

    def follow(self, step: Step) -> None:
        """Nothing: there is no cache."""

    def propose(self, asked: Sequence[Asked]) -> list[Guess]:
        """See `Drafter`."""
        return [Guess(self._guess(one), None) for one in asked]

    def _guess(self, one: Asked) -> tuple[int, ...]:
        index = self._indices.setdefault(one.key, _Index(self._sizes, self._window))
        index.update(one.tokens)
        found = index.find(one.tokens, index.pace.count(one.tokens, one.count))
        index.pace.made(one.tokens, found)
        return found

    def forget(self, key: Key) -> None:
        """See `Drafter`."""
        self._indices.pop(key, None)
