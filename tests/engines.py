"""A small model, an engine around it, and what its clients get."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch

from coterie.infer.config import EngineConfig
from coterie.infer.engine import Engine
from coterie.infer.outputs import Delta
from coterie.infer.request import SamplingParams
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.moe.config import MoEConfig

CONFIG = ModelConfig(
    vocab_size=300,
    max_positions=160,
    layers=3,
    dim=48,
    heads=6,
    kv_heads=2,
    hidden=28,
    qk_norm="head",
    init_std=0.3,
    tied_head=False,
    experts=(0, 4, 8),
    moe=MoEConfig(top_k=2, hidden=20),
)
BLOCK = CONFIG.layers * 2 * CONFIG.num_kv_heads * CONFIG.width_per_head * 4
"""Bytes of one token's keys and values in fp32."""


def model(dtype: torch.dtype = torch.float32) -> GPT:
    """The same one each time."""
    return _model(dtype)


@cache
def _model(dtype: torch.dtype) -> GPT:
    with torch.inference_mode(False):  # whoever asks first
        made = GPT(CONFIG)
        made.init_weights(8)
        made.to(dtype)
        for layer in made.moe_layers:  # as in a checkpoint that is opened
            layer.gate.float()
        return made.eval()


@cache
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat and saw a hat", "def f(x):\n    return x"] * 5, 290)


def engine(*, blocks: int = 0, text: bool = False, dtype: torch.dtype = torch.float32, **settings: Any) -> Engine:
    """blocks: so many of the pool, of `block_size` tokens; 0: as the engine likes."""
    size = settings.setdefault("block_size", 4)
    settings.setdefault("budget", 64)
    settings.setdefault("max_model_len", min(CONFIG.max_positions, blocks * size or CONFIG.max_positions))
    if blocks:
        settings["kv_memory"] = blocks * size * BLOCK * dtype.itemsize // 4
    return Engine(model(dtype), tokenizer() if text else None, EngineConfig(**settings))


def prompt(length: int, seed: int = 0) -> list[int]:
    """Of ids that are no end of a text."""
    return torch.randint(1, 290, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Client:
    """A sink that keeps everything, by choice. What it finds wrong waits in `wrong`: an engine outlives its sinks."""

    wrong: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.deltas: dict[int, list[Delta]] = {}
        self.n, self.id = 1, ""

    def __call__(self, delta: Delta) -> None:
        parts = self.deltas.setdefault(delta.key[1], [])
        if parts and parts[-1].finish is not None:
            self.wrong.append(f"{delta} after the end")
        parts.append(delta)
        if delta.generated != len(self.tokens(delta.key[1])):
            self.wrong.append(f"{delta} miscounts")

    def tokens(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas.get(index, []) for token in delta.tokens]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas[index])

    def last(self, index: int = 0) -> Delta:
        return self.deltas[index][-1]

    def finish(self, index: int = 0) -> str | None:
        parts = self.deltas.get(index)
        return parts[-1].finish if parts else None


def ask(engine: Engine, ids: Sequence[int], tokens: int = 12, **settings: Any) -> Client:
    """Submits a request that is greedy unless it says otherwise."""
    client = Client()
    names = ("id", "salt", "deadline", "grammar", "routes")
    rest = {name: settings.pop(name) for name in names if name in settings}
    settings = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True} | settings
    client.id = engine.submit(ids, SamplingParams(**settings), client, **rest)
    return client


def drain(engine: Engine, most: int = 3000) -> int:
    """Steps until all is done."""
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
        assert steps < most, "it does not end"
    check_empty(engine)
    return steps


def drain_all(engine: Engine) -> None:
    """Steps until all is done, over however many lanes; no block is held then."""
    while not engine.idle:
        engine.step()
    counts = engine.core.scheduler.counts()
    assert counts.used == counts.running == counts.waiting == 0


def check_empty(engine: Engine) -> None:
    """Nothing is kept of requests that have ended, and no client has found anything wrong."""
    assert not Client.wrong
    core = engine.core
    assert core.pool.used == 0, "blocks are leaked"
    for kept in (core.live, core._states, core._guesses, engine._aborts, core.scheduler.roster._live):
        assert not kept
    assert not core.scheduler.roster._forks
    assert not core.scheduler.roster.waiting
    assert not core.scheduler.roster.running


@torch.inference_mode()
def recomputed(ids: Sequence[int], tokens: int = 12, dtype: torch.dtype = torch.float32) -> list[int]:
    """Greedy tokens, each from a pass over all before it."""
    whole = list(ids)
    for _ in range(tokens):
        logits_BSV = model(dtype)(torch.tensor([whole]), logits_to_keep=1).logits_BSV
        assert logits_BSV is not None
        whole.append(int(logits_BSV[0, -1].argmax()))
    return whole[len(ids) :]


def alone(ids: Sequence[int], tokens: int = 12, *, of: dict[str, Any] | None = None, **settings: Any) -> list[int]:
    """What a request gives when nothing else is there."""
    served = engine(**(of or {}))
    client = ask(served, ids, tokens, **settings)
    drain(served)
    return client.tokens()
