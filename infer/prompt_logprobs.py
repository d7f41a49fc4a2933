"""Log probabilities of a prompt's own tokens, for who asks: rows of logits that no other request has.

R rows, V vocabulary, N alternatives that are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .outputs import TokenLogprob
from .request import Key
from .sample_state import PromptLogprobs, SampleState
from .sampling import told_logprobs
from .step import Slice

_AT_ONCE = 64  # rows: beside their logits they take as much again several times over


class PromptRows(NamedTuple):
    """The rows of one slice."""

    prompt: PromptLogprobs
    first: int
    """The prompt's token whose next one its first row tells of."""
    at: range
    """Where in the step's tokens they lie."""


def prompt_rows(slices: Sequence[Slice], states: Mapping[Key, SampleState]) -> list[PromptRows]:
    """The rows that tell of prompt tokens which nobody has told of yet: the scheduler bounds how many a step has."""
    found, start = [], 0
    for piece in slices:
        state = states.get(piece.key)
        prompt = None if state is None else state.prompt
        if prompt is not None:
            first, last = piece.start, min(piece.start + len(piece.tokens), len(prompt.tokens) - 1)
            known = len(prompt.told)  # what a preempted sequence, or another sample, has told is not told again
            if first <= known < last:
                found.append(PromptRows(prompt, known, range(start + known - first, start + last - first)))
        start += len(piece.tokens)
    return found


def read_prompt_rows(logits_RV: Tensor, wanted: Sequence[PromptRows]) -> None:
    """Puts what these rows, in their order, tell into each prompt's `told`."""
    row = 0
    for prompt, first, at in wanted:
        for begin in range(0, len(at), _AT_ONCE):
            count = min(_AT_ONCE, len(at) - begin)
            done = first + begin
            if done != len(prompt.told):  # another sample in this step was first
                break
            next_R = prompt.tokens[done + 1 : done + 1 + count]
            rows_RV = logits_RV[row + begin : row + begin + count].float()
            ids_R = torch.tensor(next_R, device=logits_RV.device)
            logprobs_R, top_ids_RN, top_RN = told_logprobs(rows_RV, ids_R, prompt.most)
            tops = zip(top_ids_RN.tolist(), top_RN.tolist(), strict=True)
            for token, logprob, (ids, top) in zip(next_R, logprobs_R.tolist(), tops, strict=True):
                prompt.told.append(TokenLogprob(token, logprob, tuple(zip(ids, top, strict=True))))
        row += len(at)
