"""The recorded routing of steps: how many tokens each expert had, and which experts a sample of tokens had together.

Loads are kept for each step, since what a step costs is its fullest rank, not a window's. A sample of whole tokens
holds all that pairs of experts can tell: which are taken together in a layer, and which follow each other from layer
to layer (ExFlow, arXiv 2401.08383, needs about 5,000 tokens). Tables of E x E counts for each layer would be larger
than the sample, and filling them would cost K x K increments for each token.

No torch: planners, servers and tests read these.
"""

# Shapes: S steps, L layers with experts, E experts (of the layer with most), M sampled tokens of a step, K choices.

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "coterie routes 1"
LARGEST = 1 << 30
"""Bytes of a file that is read."""
MOST_EXPERTS = 1 << 15
_TYPES = {"loads": ("uint8", "uint16", "uint32"), "tokens": ("int16",), "prompts": ("uint32",), "experts": ("int32",)}


@dataclass(frozen=True, eq=False)
class Routes:
    """What was recorded, in the order of time.

    Attributes:
        loads_SLE: tokens of each expert; unsigned.
        tokens_SMLK: the choices of some tokens of each step, the heaviest first, -1 for none; int16.
        prompts_S: how many of a step's tokens were prompts' and not decodes; uint32.
        experts: of each layer.
    """

    loads_SLE: np.ndarray
    tokens_SMLK: np.ndarray
    prompts_S: np.ndarray
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        loads, tokens, S, L = self.loads_SLE, self.tokens_SMLK, len(self.prompts_S), len(self.experts)
        if loads.ndim != 3 or tokens.ndim != 4 or self.prompts_S.ndim != 1 or not L:
            raise ValueError("routes need loads (S, L, E), tokens (S, M, L, K), prompts (S,) and numbers of experts")
        if loads.shape[:2] != (S, L) or tokens.shape[0] != S or tokens.shape[2] != L:
            raise ValueError(f"loads {loads.shape}, tokens {tokens.shape}, {S} steps and {L} layers do not agree")
        if min(self.experts) < 1 or max(self.experts) != loads.shape[2] or loads.shape[2] > MOST_EXPERTS:
            raise ValueError(f"layers of {self.experts} experts do not fit loads of {loads.shape[2]}")
        limit_L1 = np.array(self.experts)[:, None]
        if (tokens < -1).any() or (tokens >= limit_L1).any():
            raise ValueError("a token's choice is no expert of its layer")
        if loads[:, np.arange(loads.shape[2]) >= limit_L1].any():
            raise ValueError("a load is of an expert that its layer does not have")

    def __len__(self) -> int:
        return len(self.prompts_S)

    def part(self, steps: slice | np.ndarray) -> Routes:
        """Some of the steps: a slice or a mask (S,)."""
        return Routes(self.loads_SLE[steps], self.tokens_SMLK[steps], self.prompts_S[steps], self.experts)

    def layers(self, which: Sequence[int]) -> Routes:
        """Some of the layers, which may be those of one size."""
        some = np.array(which)
        experts = tuple(self.experts[i] for i in some)
        loads = self.loads_SLE[:, some, : max(experts)]
        return Routes(loads, self.tokens_SMLK[:, :, some], self.prompts_S, experts)

    @property
    def sampled_LTK(self) -> np.ndarray:
        """The sample without its steps, and without the places of tokens that were not there."""
        tokens_TLK = self.tokens_SMLK.reshape(-1, *self.tokens_SMLK.shape[2:])
        return np.ascontiguousarray(tokens_TLK[(tokens_TLK >= 0).any((1, 2))].transpose(1, 0, 2))

    @cached_property
    def pairs_LEE(self) -> np.ndarray:
        """In how many sampled tokens two experts of a layer met; symmetric, zeros on the diagonal; float32."""
        K, E = self.tokens_SMLK.shape[3], self.loads_SLE.shape[2]
        first, second = np.triu_indices(K, 1)
        half = np.stack([_count(ids[:, first], ids[:, second], E) for ids in self.sampled_LTK])
        return half + half.transpose(0, 2, 1)

    @cached_property
    def pairs_L(self) -> np.ndarray:
        """How many pairs met in each layer, each counted twice; float32."""
        return self.pairs_LEE.sum((1, 2))

    @cached_property
    def transitions_LEE(self) -> np.ndarray:
        """Entry l: how many sampled tokens had expert e first in layer l and f, anywhere, in layer l + 1; float32."""
        E, sample = self.loads_SLE.shape[2], self.sampled_LTK
        counts = [_count(a[:, :1], b, E) for a, b in pairwise(sample)]
        return np.stack(counts) if counts else np.zeros((0, E, E), np.float32)


def _count(first: np.ndarray, second: np.ndarray, experts: int) -> np.ndarray:
    first, second = np.broadcast_arrays(first, second)
    both = (first >= 0) & (second >= 0)
    codes = first[both].astype(np.int64) * experts + second[both]
    return np.bincount(codes, minlength=experts * experts).reshape(experts, experts).astype(np.float32)


class Recorder:
    """Keeps steps in bounded memory. When it is full, every second kept step is dropped and from then on half as many
    are kept, so that what is kept is spread evenly over all that was seen.

    Args:
        experts: of each layer.
        top_k: choices of a token, the most of any layer.
        sampled: tokens kept of a step.
        memory: bytes, at most; 2 steps at least are kept.
    """

    def __init__(self, experts: Sequence[int], top_k: int, *, sampled: int = 4, memory: int = 64 << 20) -> None:
        self.experts = tuple(experts)
        shape = (len(self.experts), max(self.experts))
        step = 4 * shape[0] * shape[1] + 2 * sampled * shape[0] * top_k + 4
        self._room = max(2, memory // step // 2 * 2)
        self._loads = np.zeros((self._room, *shape), np.uint32)
        self._tokens = np.full((self._room, sampled, shape[0], top_k), -1, np.int16)
        self._prompts = np.zeros(self._room, np.uint32)
        self._kept = self._seen = 0
        self._stride = 1

    def __len__(self) -> int:
        return self._kept

    @property
    def bytes(self) -> int:
        """Of what is kept."""
        return sum(array[: self._kept].nbytes for array in (self._loads, self._tokens, self._prompts))

    @property
    def wanted(self) -> bool:
        """Whether the next step would be kept: where not, its numbers need not be fetched from a device."""
        return self._seen % self._stride == 0

    def add(self, loads_LE: np.ndarray | Sequence[Sequence[int]], ids_LTK: np.ndarray | None, prompts: int) -> None:
        """One step.

        Args:
            loads_LE: tokens of each expert; a layer may be shorter than the longest.
            ids_LTK: the choices of all tokens, or of those that the caller has; None: of none.
            prompts: how many of its tokens were prompts'.
        """
        wanted = self.wanted
        self._seen += 1
        if not wanted:
            return
        if self._kept == self._room:
            self._thin()  # the room is even, so this step is still one of those wanted
        at, self._kept = self._kept, self._kept + 1
        for layer, count in enumerate(self.experts):
            self._loads[at, layer, :count] = loads_LE[layer][:count]
        self._prompts[at] = prompts
        self._tokens[at] = -1
        if ids_LTK is not None and ids_LTK.shape[1]:
            some_LMK = ids_LTK[:, spread_places(ids_LTK.shape[1], self._tokens.shape[1])]
            self._tokens[at, : some_LMK.shape[1], :, : some_LMK.shape[2]] = some_LMK.transpose(1, 0, 2)

    def _thin(self) -> None:
        self._kept //= 2
        self._stride *= 2
        for array in (self._loads, self._tokens, self._prompts):
            array[: self._kept] = array[: 2 * self._kept : 2].copy()

    def routes(self) -> Routes:
        """A copy of what is kept."""
        n = self._kept
        return Routes(self._loads[:n].copy(), self._tokens[:n].copy(), self._prompts[:n].copy(), self.experts)

    def clear(self) -> None:
        """Begins anew, as a planner does that wants what happened since."""
        self._kept = self._seen = 0
        self._stride = 1


def spread_places(tokens: int, most: int, turn: int | None = None) -> slice:
    """Places of at most so many of a step's tokens, evenly spread. Sequences keep their places from step to step, so
    `turn`, the step's number, moves the sample on; None: it is in the middle."""
    count = max(1, min(tokens, most))
    stride = max(1, tokens // count)
    left = max(1, tokens - stride * (count - 1))
    first = left // 2 if turn is None else turn % left
    return slice(first, min(tokens, first + stride * count), stride)


def save(routes: Routes, path: str | Path) -> None:
    """Writes a safetensors file, whole or not at all, with loads in the smallest type that holds them. OSError: it
    cannot be written."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    loads = routes.loads_SLE.astype(np.min_scalar_type(int(routes.loads_SLE.max(initial=0))))
    arrays = {"loads": loads, "tokens": routes.tokens_SMLK, "prompts": routes.prompts_S}
    arrays["experts"] = np.array(routes.experts, np.int32)
    try:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, metadata={"format": FORMAT})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    os.replace(part, path)


def load(path: str | Path) -> Routes:
    """Reads what `save` wrote, and believes none of it.

    Raises:
        ValueError: it is no such file, is larger than 1 GiB, or its parts do not agree.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file of routes")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size} bytes, which is over the {LARGEST} that are read")
    try:
        with safe_open(str(path), framework="numpy") as file:
            if (file.metadata() or {}).get("format") != FORMAT or set(file.keys()) != set(_TYPES):
                raise ValueError(f"{path} is no file of routes: it is not marked {FORMAT!r} or has other parts")
            arrays = {name: file.get_tensor(name) for name in _TYPES}
    except (SafetensorError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no file of routes: {error}") from None
    for name, array in arrays.items():
        if array.dtype.name not in _TYPES[name]:
            raise ValueError(f"{path}: {name} is of type {array.dtype}, expected {' or '.join(_TYPES[name])}")
    if arrays["experts"].ndim != 1:
        raise ValueError(f"{path}: experts is not one number for each layer")
    try:
        experts = tuple(int(n) for n in arrays["experts"])
        return Routes(arrays["loads"], arrays["tokens"], arrays["prompts"], experts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
