"""One step on the model: copies of blocks, one pass over all slices, and a token for each sequence that wants one.

T tokens of a step, R rows that want logits, V vocabulary, L MoE layers, E experts, K choices, D drafts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.gpt import GPT
from .decodes import Decodes
from .drafts import Guess
from .fleet import Fleet, Passed
from .memory import read_rate
from .outputs import TokenLogprob
from .paged import KVPool, PagedCache, sent
from .prompt_logprobs import prompt_rows, read_prompt_rows
from .request import Key
from .routes import spread_places
from .sample_state import GREEDY, SampleState
from .sampling import Row, Sampled, SamplingBatch, sample_batch
from .speculative import accept, accept_drawn
from .step import Result, Slice, Step

NOT_FINITE = "the model's logits are not finite: its weights are damaged, or dtype is too narrow"
NOTHING_ALLOWED = "no token is allowed here: the grammar, the bias and the banned tokens leave none"

Routes = tuple[tuple[int, ...], ...]
"""Per MoE layer the experts of one token."""


class Told(NamedTuple):
    """What one sequence asked to be told of its new tokens, one entry a token."""

    logprobs: tuple[TokenLogprob, ...]
    routes: tuple[Routes, ...]


@dataclass
class Ran:
    """What a step gave."""

    results: dict[Key, Result] = field(default_factory=dict)
    told: dict[Key, Told] = field(default_factory=dict)
    """Of sequences that asked."""
    loads: tuple[tuple[int, ...], ...] = ()
    """Per MoE layer the assignments of each expert, where asked for."""
    routes_LMK: np.ndarray | None = None
    """The choices of some tokens, where asked for."""
    drafted: int = 0
    accepted: int = 0


@dataclass
class _Wanted:
    """One slice that wants logits: its rows are consecutive."""

    piece: Slice
    state: SampleState
    at: int
    """Where in the step's tokens its first row lies."""
    first: int
    """Its first row."""
    drafts: tuple[int, ...]
    probs_DV: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.drafts) + 1


class Runner:
    """Runs steps of the scheduler on one model and one pool of blocks.

    Attributes:
        pool: keys and values.
        fleet: the ranks that hold the model, None where it is all here.
        memory_rate: bytes a second, measured; 0: the model is too small to tell, or on several ranks.
    """

    def __init__(self, model: GPT, pool: KVPool, fleet: Fleet | None = None) -> None:
        self.model, self.config, self.pool, self.fleet = model.eval(), model.config, pool, fleet
        self.cache, self.decodes = PagedCache(pool), Decodes(self.model, pool)
        self.device = model.embed.weight.device
        self.memory_rate = read_rate(model) if fleet is None else 0.0
        if fleet is not None:
            fleet.use(pool)

    def run(
        self,
        step: Step,
        states: Mapping[Key, SampleState] | None = None,
        *,
        guesses: Mapping[Key, Guess] | None = None,
        loads: bool = False,
        sampled: int = 0,
    ) -> Ran:
        """Computes a step: `start`, and its end."""
        return self.start(step, states, guesses=guesses, loads=loads, sampled=sampled)()

    @torch.inference_mode()
    def start(
        self,
        step: Step,
        states: Mapping[Key, SampleState] | None = None,
        *,
        guesses: Mapping[Key, Guess] | None = None,
        loads: bool = False,
        sampled: int = 0,
    ) -> Callable[[], Ran]:
        """Starts a step, and gives what waits for it: while a GPU computes, the host is free. Steps do not overlap.

        Args:
            step: its slices hold one token at least.
            states: of its sequences; one that is missing is greedy.
            guesses: where the drafts of a slice came from; one that is missing was no random choice.
            loads: whether to count what each expert was asked for.
            sampled: of how many tokens to tell the choices.
        """
        wanted = _wanted(step.slices, states or {}, guesses or {})
        prompts = prompt_rows(step.slices, states or {})
        rows = [at for one in wanted for at in range(one.at, one.at + one.count)]
        out = self._pass(
            step,
            rows + [at for one in prompts for at in one.at],
            loads or sampled > 0 or any(one.state.routes for one in wanted),
        )
        logits_RV, told_RV = out.logits_RV.tensor_split([len(rows)])
        read = _draw(logits_RV, wanted, out.routes) if wanted else None
        counts = self._count(out.routes) if loads else None
        some_LMK = self._sample(out.routes, step, sampled) if sampled and out.routes else None

        def end() -> Ran:
            ran = Ran()
            with torch.inference_mode():
                if prompts:
                    read_prompt_rows(told_RV, prompts)
                if read is not None:
                    read(ran)
                if counts is not None:
                    ran.loads = self._loads(counts)
                if some_LMK is not None:
                    ran.routes_LMK = some_LMK.cpu().numpy()
            return ran

        return end

    def _pass(self, step: Step, rows: list[int], routes: bool) -> Passed:
        """The model on a step, with logits of these of its tokens."""
        if self.fleet is not None:
            return self.fleet.lead(step, rows, routes)
        self.pool.copy(step.copies)
        whole = rows == list(range(step.tokens))
        out = self.decodes.run(step.slices) if whole else None
        if out is None:
            tokens_1T, positions_1T = self.cache.begin(step.slices)
            rows_R = None if whole else sent(torch.tensor(rows, dtype=torch.int64), self.device)
            out = self.model(tokens_1T, positions_1T, cache=self.cache, rows_R=rows_R)
        assert out.logits_BSV is not None
        return Passed(out.logits_BSV[0], out.routes)

    def _count(self, routes: tuple[Tensor, ...]) -> Tensor | None:
        """Assignments of each expert of each layer, (L * E,); nothing waits for the device."""
        if not routes:
            return None
        most = max(moe.num_experts for moe in self.model.moe_layers)
        first_L11 = most * torch.arange(len(routes), device=routes[0].device)[:, None, None]
        ids_A = (torch.stack(routes) + first_L11).flatten()
        counts = torch.zeros(most * len(routes), dtype=torch.int64, device=ids_A.device)
        return counts.scatter_add_(0, ids_A, torch.ones_like(ids_A))

    def _sample(self, routes: tuple[Tensor, ...], step: Step, sampled: int) -> Tensor:
        """The choices of some tokens, (L, M, K); nothing waits for the device."""
        return torch.stack(routes)[:, spread_places(step.tokens, sampled, step.number)]

    def _loads(self, counts: Tensor) -> tuple[tuple[int, ...], ...]:
        experts = [moe.num_experts for moe in self.model.moe_layers]
        rows = counts.view(len(experts), -1).tolist()
        return tuple(tuple(row[:count]) for row, count in zip(rows, experts, strict=True))


def _wanted(
    slices: Sequence[Slice], states: Mapping[Key, SampleState], guesses: Mapping[Key, Guess]
) -> list[_Wanted]:
    wanted, start, row = [], 0, 0
    for piece in slices:
        end = start + len(piece.tokens)
        if piece.wants_logits:
            drafts = piece.tokens[len(piece.tokens) - piece.drafts :]
            guess = guesses.get(piece.key) if drafts else None
            probs_DV = None if guess is None or guess.probs_NV is None else guess.probs_NV[: len(drafts)]
            state = states.get(piece.key, GREEDY)
            wanted.append(_Wanted(piece, state, end - len(drafts) - 1, row, drafts, probs_DV))
            row += len(drafts) + 1
        start = end
    return wanted


class _Drawn:
    """Tokens drawn for all rows; reading them waits for the device."""

    def __init__(self, logits_RV: Tensor, wanted: list[_Wanted], routes: tuple[Tensor, ...]) -> None:
        self.logits_RV, self.wanted, self.routes = logits_RV, wanted, routes
        self.rows = [row for one in wanted for row in _rows(one)]
        self.drawn = sample_batch(logits_RV, SamplingBatch(self.rows))

    def read(self, ran: Ran) -> None:
        """Puts what was drawn into `ran`."""
        ids, ok = self.drawn.read()
        chosen = accept_drawn([one.drafts for one in self.wanted], ids, ok)
        for i, one in enumerate(self.wanted):
            if one.probs_DV is not None:
                part_RV = self.logits_RV[one.first : one.first + one.count]
                batch = SamplingBatch(self.rows[one.first : one.first + one.count])
                chosen[i] = accept([one.drafts], part_RV, batch, one.probs_DV)[0]
        tell = _Teller(self.logits_RV, self.drawn, self.wanted, self.routes)
        for one, tokens in zip(self.wanted, chosen, strict=True):
            key, rows = one.piece.key, self.rows[one.first : one.first + one.count]
            if not tokens or not all(ok[one.first : one.first + len(tokens)]):
                bound = any(row.mask is not None or row.banned for row in rows)
                ran.results[key] = Result(0, error=NOTHING_ALLOWED if bound else NOT_FINITE)
                continue
            accepted = len(tokens) - 1
            ran.results[key] = Result(tokens[-1], accepted)
            ran.drafted += len(one.drafts)
            ran.accepted += accepted
            if one.state.routes or one.state.settings.logprobs is not None:
                ran.told[key] = tell(one, tokens)


def _draw(logits_RV: Tensor, wanted: list[_Wanted], routes: tuple[Tensor, ...]) -> Callable[[Ran], None]:
    """Draws all rows at once, and gives what reads them. Where either raises, each sequence is drawn by itself, so
    that the one to blame fails alone."""
    drawn = None
    with contextlib.suppress(Exception):
        drawn = _Drawn(logits_RV, wanted, routes)

    def read(ran: Ran) -> None:
        try:
            if drawn is not None:
                drawn.read(ran)
                return
        except Exception:
            ran.results, ran.told, ran.drafted, ran.accepted = {}, {}, 0, 0
        for one in wanted:
            alone_RV, one.first = logits_RV[one.first : one.first + one.count], 0
            try:
                _Drawn(alone_RV, [one], routes).read(ran)
            except Exception as error:
                ran.results[one.piece.key] = Result(0, error=f"its next token could not be chosen: {_brief(error)}")

    return read


def _rows(one: _Wanted) -> list[Row]:
    generated = one.piece.start + len(one.piece.tokens) - len(one.drafts) - one.state.prompt_length
    return [one.state.row(generated, one.drafts[:i]) for i in range(one.count)]


class _Teller:
    """Reads log probabilities and routes of those who asked, all at once."""

    def __init__(self, logits_RV: Tensor, drawn: Sampled, wanted: list[_Wanted], routes: tuple[Tensor, ...]) -> None:
        self.logits_RV, self.ids = logits_RV, drawn.ids_B
        asked = any(one.state.settings.logprobs is not None for one in wanted)
        self.logprobs = drawn.logprobs_B.tolist() if asked else []
        self.top_ids = drawn.top_ids_BN.tolist() if asked else []
        self.top = drawn.top_logprobs_BN.tolist() if asked else []
        self.drawn = drawn.ids_B.tolist() if asked else []
        at = [i for one in wanted if one.state.routes for i in range(one.at, one.at + one.count)]
        self.routes: dict[int, Routes] = {}
        if at and routes:
            at_N = torch.tensor(at, device=logits_RV.device)
            told = torch.stack([ids_TK[at_N] for ids_TK in routes], dim=1).tolist()
            self.routes = {i: tuple(map(tuple, one)) for i, one in zip(at, told, strict=True)}

    def __call__(self, one: _Wanted, tokens: list[int]) -> Told:
        logprobs: list[TokenLogprob] = []
        most = one.state.settings.logprobs
        if most is not None:
            for row, token in enumerate(tokens, one.first):
                top = tuple(zip(self.top_ids[row][:most], self.top[row][:most], strict=True))
                logprob = self.logprobs[row] if token == self.drawn[row] else self._logprob(row, token)
                logprobs.append(TokenLogprob(token, logprob, top))
        routes = tuple(self.routes.get(one.at + i, ()) for i in range(len(tokens))) if one.state.routes else ()
        return Told(tuple(logprobs), routes)

    def _logprob(self, row: int, token: int) -> float:
        """Of a guess that was taken though the row drew another token."""
        return float(self.logits_RV[row].float().log_softmax(0)[token])


def _brief(error: Exception) -> str:
    """What a client may read: a grammar says why it is no match, the rest of us may name files."""
    return " ".join(str(error).split())[:200] if isinstance(error, ValueError) else type(error).__name__
