"""Synthetic routes: skewed, drifting, bursty, with topics that take some experts together.

Every layer has a popularity of its experts, by Zipf's law in a random order, and every topic likes some experts of
each layer more. A token has a topic and draws its experts without replacement.
"""

# Shapes: S steps, T tokens, L layers, E experts, K choices, Z topics.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..infer.routes import Recorder, Routes

Kind = Literal["steady", "drifting", "bursty"]
TOPICS = 16
SHARE = 8
"""A topic likes one expert of so many."""
LIKING = 2.0
"""By how much, in logs."""


@dataclass(frozen=True)
class Source:
    """How to make routes.

    Attributes:
        zipf: exponent of the experts' popularity.
        kind: steady: every token draws its topic from one mix. drifting: the mix goes over into another one, and a
            quarter of the experts change places in popularity meanwhile. bursty: every four steps have a mix of few
            topics.
        tokens: of a step.
        prompts: whether they are prompts'.
    """

    experts: int
    top_k: int
    layers: int
    zipf: float
    kind: Kind
    tokens: int
    steps: int
    prompts: bool = False

    def routes(self, seed: int = 0) -> Routes:
        """The same for the same seed."""
        dice = np.random.default_rng([seed, self.experts, self.tokens, round(10 * self.zipf), len(self.kind)])
        E, L = self.experts, self.layers
        law_E = -self.zipf * np.log(np.arange(1, E + 1, dtype=np.float32))
        order_LE = np.stack([dice.permutation(E) for _ in range(L)])
        base_LE = law_E[order_LE]
        later_LE = base_LE.copy()
        if self.kind == "drifting":
            for layer in range(L):
                some = dice.choice(E, E // 4, replace=False)
                later_LE[layer, some] = base_LE[layer, dice.permutation(some)]
        likes_ZLE = LIKING * (dice.random((TOPICS, L, E)) < 1 / SHARE).astype(np.float32)
        mixes_2Z = dice.dirichlet(np.ones(TOPICS), 2)
        recorder = Recorder([E] * L, self.top_k, sampled=max(4, 4096 // self.steps), memory=1 << 30)
        burst_Z = mixes_2Z[0]
        for step in range(self.steps):
            along = step / max(1, self.steps - 1) if self.kind == "drifting" else 0.0
            mix_Z = (1 - along) * mixes_2Z[0] + along * mixes_2Z[1]
            if self.kind == "bursty":
                if step % 4 == 0:
                    burst_Z = dice.dirichlet(2 * mix_Z + 1e-3)
                mix_Z = burst_Z
            topic_T = dice.choice(TOPICS, self.tokens, p=mix_Z)
            taste_LE = (1 - along) * base_LE + along * later_LE
            ids_LTK = self._choose(dice, taste_LE, likes_ZLE, topic_T)
            loads_LE = np.stack([np.bincount(ids.ravel(), minlength=E) for ids in ids_LTK])
            recorder.add(loads_LE, ids_LTK, self.tokens if self.prompts else 0)
        return recorder.routes()

    def _choose(self, dice, taste_LE: np.ndarray, likes_ZLE: np.ndarray, topic_T: np.ndarray) -> np.ndarray:
        """Gumbel's trick: the K largest of ln p - ln(-ln u) are draws without replacement, in order."""
        out = []
        for layer, taste_E in enumerate(taste_LE):
            noise_TE = dice.standard_exponential((len(topic_T), self.experts), dtype=np.float32)
            noise_TE *= np.exp(-(taste_E + likes_ZLE[:, layer]))[topic_T]  # the smallest of exp(-score) x Exp(1)
            some_TK = np.argpartition(noise_TE, self.top_k, axis=1)[:, : self.top_k]
            rank_TK = np.argsort(np.take_along_axis(noise_TE, some_TK, 1), axis=1)
            out.append(np.take_along_axis(some_TK, rank_TK, 1))
        return np.stack(out).astype(np.int16)
