"""How the tokens of one sequence are chosen: its settings, its random numbers, and what it said before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from .outputs import TokenLogprob
from .penalties import History, penalised
from .request import SamplingParams
from .sampling import Row


class Matcher(Protocol):
    """A sequence's way through a grammar (`grammar.Matcher`)."""

    done: bool

    def mask(self) -> Tensor:
        """What may come next; see `penalties.mask_`."""
        ...

    def accept(self, token: int) -> None:
        """Goes on by a token that was allowed."""
        ...


@dataclass(slots=True, eq=False)
class PromptLogprobs:
    """Of the tokens of one prompt, but for the first; shared by all samples of a request.

    Attributes:
        most: likeliest others that are told of each.
        told: one each so far, from the second token on.
    """

    tokens: tuple[int, ...]
    most: int
    told: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class SampleState:
    """What the runner must know of one sequence to draw its tokens.

    Attributes:
        settings: checked.
        seed: of this choice: see `counter.seed_of_choice`.
        prompt_length: tokens before the first generated one.
        ends: tokens that end the sequence, banned before `min_tokens` are generated.
        routes: whether to tell which experts computed each token.
        prompt: what is told of the prompt's tokens; None: nothing.
    """

    settings: SamplingParams
    seed: int = 0
    prompt_length: int = 0
    ends: tuple[int, ...] = ()
    history: History | None = None
    matcher: Matcher | None = None
    routes: bool = False
    prompt: PromptLogprobs | None = None

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        settings: SamplingParams,
        *,
        seed: int,
        eos_ids: Sequence[int] = (),
        matcher: Matcher | None = None,
        routes: bool = False,
        told: PromptLogprobs | None = None,
    ) -> SampleState:
        """The state of a sequence that has generated nothing."""
        ends = settings.stop_token_ids if settings.ignore_eos else (*settings.stop_token_ids, *eos_ids)
        history = History(prompt) if penalised(settings) else None
        return cls(settings, seed, len(prompt), tuple(dict.fromkeys(ends)), history, matcher, routes, told)

    def row(self, generated: int, drafts: tuple[int, ...] = ()) -> Row:
        """What decides the token after `generated` tokens and, beyond these, `drafts`."""
        position = generated + len(drafts)
        return Row(
            self.settings,
            self.seed,
            position,
            self.history,
            drafts,
            self.ends if position < self.settings.min_tokens else (),
            None if self.matcher is None else self.matcher.mask(),
        )

    def take(self, tokens: Sequence[int]) -> None:
        """Goes on by generated tokens."""
        if self.history is not None:
            for token in tokens:
                self.history.add(token)
        if self.matcher is not None:
            for token in tokens:
                self.matcher.accept(token)


GREEDY = SampleState(SamplingParams(temperature=0.0))
"""Of sequences that nobody knows: steps that are only timed."""
