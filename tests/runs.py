"""Small training runs for tests: a model, batches, and token files made in a second."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.moe.config import GateConfig, MoEConfig
from coterie.parallel.launch import Ranks
from coterie.train.config import CheckpointConfig, LogConfig, OptimConfig, TrainConfig
from coterie.train.data import Batch
from coterie.train.loop import Trainer
from coterie.train.objective import LanguageModelling

ONE = Ranks(0, 0, 1, torch.device("cpu"))


def small_model(**gate: Any) -> ModelConfig:
    """A dense layer and two MoE layers of a pyramid, every size another number."""
    return ModelConfig(
        vocab_size=61,
        max_positions=16,
        layers=3,
        dim=24,
        heads=3,
        hidden=40,
        experts=(0, 2, 4),
        moe=MoEConfig(top_k=2, hidden=20, residual=True, gate=GateConfig(**gate)),
    )


def small_config(folder: Path, model: ModelConfig | None = None, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        run_dir=str(folder),
        seq_len=10,
        batch_size=8,
        micro_batch=2,
        steps=6,
        eval_batches=0,
        model=model or small_model(),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_tokens=160),
        log=LogConfig(every=1000, tensorboard=False),
        checkpoint=CheckpointConfig(),
    )
    return replace(config, **changes)


def build(config: ModelConfig, seed: int = 7) -> GPT:
    model = GPT(config)
    model.init_weights(seed)
    return model


def sequence(index: int, length: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    start, stride = (int(x) for x in torch.randint(1, vocab, (2,), generator=generator))
    return (start + stride % 5 * torch.arange(length + 1)) % vocab


def make_batch(first: int, count: int, config: TrainConfig, masked: bool = True) -> Batch:
    """Arithmetic sequences; each has another number of targets, so that a mean of means would be wrong."""
    rows = torch.stack([sequence(i, config.seq_len, config.model.vocab_size) for i in range(first, first + count)])
    targets = rows[:, 1:].clone()
    if masked:
        for row, i in zip(targets, range(first, first + count), strict=True):
            row[: i % 4] = -100
    return Batch(rows[:, :-1].contiguous(), targets, None)


def batch_steps(config: TrainConfig, rank: int = 0, world: int = 1):
    """The data of a run: sample i is `sequence(i)`, whatever the batch sizes and ranks."""
    share = config.batch_size // world
    micro = config.micro_batch or share

    def steps(consumed: int):
        for first in range(consumed, consumed + 10_000 * config.batch_size, config.batch_size):
            mine = first + rank * share
            yield [make_batch(i, micro, config) for i in range(mine, mine + share, micro)]

    return steps


def make_trainer(config: TrainConfig, model: GPT | None = None, ranks: Ranks = ONE, **options: Any) -> Trainer:
    model = model or build(config.model)
    steps = options.pop("steps", None) or batch_steps(config, ranks.rank, ranks.world)
    return Trainer(model, options.pop("objective", LanguageModelling()), steps, config, ranks, **options)


def write_text(path: Path, lines: int = 300) -> Path:
    """Words of a made-up language, always the same."""
    draw = random.Random(3)
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 6))) for _ in range(60)]
    path.write_text("".join(" ".join(draw.choice(words) for _ in range(40)) + "\n\n" for _ in range(lines)))
    return path
