"""What guesses tokens ahead, for the model to check several at once."""

from __future__ import annotations

from collections.abc import Sequence
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


class Asked(NamedTuple):
    """One sequence that guesses are wanted for."""

    key: Key
    tokens: Sequence[int]
    blocks: tuple[int, ...]
    count: int
    row: Row


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
