"""Ready runs. A recipe is a function that returns a TrainConfig; the command line overrides any leaf of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..models.config import ModelConfig
from ..models.presets import PRESETS
from ..moe.config import GateConfig, MoEConfig
from ..moe.pyramid import pyramid
from .config import CheckpointConfig, DataConfig, OptimConfig, ParallelConfig, TrainConfig


def tiny() -> TrainConfig:
    """A PR-MoE that trains in seconds: for tests and for a first look."""
    model = ModelConfig(
        vocab_size=512,
        max_positions=64,
        layers=2,
        dim=32,
        heads=2,
        hidden=64,
        experts=(4, 8),
        moe=MoEConfig(top_k=1, hidden=32, residual=True),
    )
    return TrainConfig(
        run_dir="runs/tiny",
        seq_len=32,
        batch_size=8,
        steps=20,
        eval_batches=2,
        model=model,
        optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_tokens=4 * 8 * 32),
    )


def _quickstart(name: str, experts: tuple[int, ...]) -> TrainConfig:
    """Expert and residual MLP together are as wide as the dense MLP: both models activate the same parameters."""
    model = ModelConfig(
        vocab_size=4096,
        max_positions=256,
        layers=4,
        dim=192,
        heads=3,
        hidden=512,
        experts=experts,
        init_std=0.06,
        moe=MoEConfig(top_k=1, hidden=256, residual=True),
    )
    batch, length, steps = 8, 256, 700
    return TrainConfig(
        run_dir=f"quickstart/{name}",
        seq_len=length,
        batch_size=batch,
        steps=steps,
        eval_every=175,
        eval_batches=24,
        model=model,
        data=DataConfig(train=("quickstart/data/train",), valid=("quickstart/data/valid",)),
        optim=OptimConfig(lr=2e-3, min_lr=1e-4, warmup_tokens=60 * batch * length),
        parallel=ParallelConfig(ep=2),
        checkpoint=CheckpointConfig(every=175, keep=1),
    )


def quickstart_prmoe() -> TrainConfig:
    """Pyramid-Residual-MoE on Python's own sources: 8, then 16 experts on every second layer; two ranks."""
    return _quickstart("prmoe", pyramid(4, 2, 8, 16, 1))


def quickstart_dense() -> TrainConfig:
    """The dense model with the activated parameters of `quickstart_prmoe`."""
    return _quickstart("dense", ())


_LAYERS = 8
# In every feed-forward layer each of these activates the width of the dense model, 512.
_ONE = MoEConfig(top_k=1, hidden=512)
_TWO = MoEConfig(top_k=2, hidden=256)
_RESIDUAL = MoEConfig(top_k=1, hidden=256, residual=True)
_HALF = _LAYERS // 2
_ABLATION: dict[str, tuple[tuple[int, ...], MoEConfig]] = {
    "dense": ((), MoEConfig()),
    "moe": (pyramid(_LAYERS, 2, 16, 16, 0), _ONE),
    "top2": (pyramid(_LAYERS, 2, 16, 16, 0), _TWO),
    "residual": (pyramid(_LAYERS, 2, 16, 16, 0), _RESIDUAL),
    "pyramid": (pyramid(_LAYERS, 2, 8, 32, 1), _ONE),
    "pr_moe": (pyramid(_LAYERS, 2, 8, 32, 1), _RESIDUAL),
    "first_half": ((16,) * _HALF + (0,) * _HALF, _ONE),
    "second_half": ((0,) * _HALF + (16,) * _HALF, _ONE),
}


def _wikitext(name: str) -> TrainConfig:
    """One row of the ablation on WikiText-2 (2.4M tokens, GPT-2's tokenizer): six tenths of it, seen once.

    The evaluation at the end takes all of the validation text.
    """
    experts, moe = _ABLATION[name]
    model = ModelConfig(
        vocab_size=50257, max_positions=256, layers=_LAYERS, dim=128, heads=4, hidden=512, experts=experts, moe=moe
    )
    batch, length, steps = 8, 256, 700
    return TrainConfig(
        run_dir=f"runs/wikitext_{name}",
        seq_len=length,
        batch_size=batch,
        steps=steps,
        eval_every=steps,
        eval_batches=126,
        model=model,
        data=DataConfig(train=("data/wikitext-2/train",), valid=("data/wikitext-2/valid",)),
        optim=OptimConfig(lr=2e-3, min_lr=1e-4, warmup_tokens=50 * batch * length),
        parallel=ParallelConfig(dtype="bfloat16"),
        checkpoint=CheckpointConfig(every=0),
    )


# Model, sequences of a step, peak and final rate, tokens until the final rate, and run length, all from the
# published DeepSpeed-MoE training scripts; MoE models take a lower peak, a much lower end and a longer decay.
_PAPER: dict[str, tuple[str, int, float, float, float]] = {
    "125m_moe64": ("gpt-125m-moe-64", 256, 4.5e-4, 4.5e-6, 300e9),
    "350m_dense": ("gpt-350m", 256, 3.0e-4, 3.0e-5, 260e9),
    "350m_moe128": ("gpt-350m-moe-128", 256, 2.0e-4, 2.0e-6, 300e9),
    "350m_prmoe": ("gpt-350m-pr-moe", 256, 3.0e-4, 1.0e-6, 300e9),
    "350m_mos": ("gpt-350m-mos", 256, 3.0e-4, 1.0e-6, 300e9),
    "1.3b_dense": ("gpt-1.3b", 512, 2.0e-4, 2.0e-5, 260e9),
    "1.3b_moe128": ("gpt-1.3b-moe-128", 512, 1.2e-4, 1.0e-6, 300e9),
    "1.3b_prmoe": ("gpt-1.3b-pr-moe", 512, 1.2e-4, 1.0e-6, 300e9),
    "1.3b_mos": ("gpt-1.3b-mos", 512, 1.2e-4, 1.0e-6, 300e9),
    "6.7b_dense": ("gpt-6.7b", 1024, 1.2e-4, 1.2e-5, 260e9),
    # Models that the paper serves and does not train: batches and rates here are plans, not published numbers.
    "2.4b_moe128": ("gpt-2.4b-moe-128", 512, 1.2e-4, 1.0e-6, 300e9),
    "8b_moe128": ("gpt-8b-moe-128", 1024, 1.0e-4, 1.0e-6, 300e9),
    "24b_moe128": ("gpt-24b-moe-128", 1024, 1.0e-4, 1.0e-6, 300e9),
    "47b_moe128": ("gpt-47b-moe-128", 1024, 1.0e-4, 1.0e-6, 300e9),
}


def _paper(name: str) -> TrainConfig:
    """DeepSpeed-MoE's run on 64 GPUs: 300B tokens, warm-up 375M, cosine, AdamW 0.9/0.95, decay 0.1, clip 1.0.
    bf16 stands for its fp16."""
    preset, batch, lr, min_lr, decay = _PAPER[name]
    model = PRESETS[preset]()
    return TrainConfig(
        run_dir=f"runs/{name}",
        seq_len=2048,
        batch_size=batch,
        micro_batch=4,
        tokens=300_000_000_000,
        eval_every=1000,
        eval_batches=10,
        model=model,
        data=DataConfig(train=("data/pile/train",), split="98,2,0"),
        optim=OptimConfig(lr=lr, min_lr=min_lr, warmup_tokens=375_000_000, decay_tokens=int(decay)),
        parallel=ParallelConfig(ep=64 if model.experts else 1, dtype="bfloat16", recompute="full"),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )


def _small(name: str, preset: str) -> TrainConfig:
    """For one GPU or a patient CPU: a modern small model on a dropless gate."""
    return TrainConfig(
        run_dir=f"runs/{name}",
        seq_len=1024,
        batch_size=64,
        micro_batch=8,
        tokens=1_000_000_000,
        eval_every=250,
        model=replace(PRESETS[preset](), moe=replace(PRESETS[preset]().moe, gate=GateConfig(z_weight=1e-3))),
        data=DataConfig(train=("data/train",)),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_tokens=20_000_000),
        parallel=ParallelConfig(dtype="bfloat16"),
        checkpoint=CheckpointConfig(every=250),
    )


CONTINUE = "continue"


def _continue() -> TrainConfig:
    """Goes on with the model of --init, an upcycled one above all: the rate rises again to half of the peak that the
    model was first trained with and falls to where that training ended, in batches of 4M tokens. From "Upcycling
    Large Language Models into Mixture of Experts" (arXiv 2410.07524, sections 3.2 and 3.3: a constant low rate learns
    less, and a router loss of 0.01 without a z-loss is enough), whose 2B model went from 2e-4 to 2e-5 at first."""
    return TrainConfig(
        run_dir="runs/continue",
        seq_len=2048,
        batch_size=2048,
        micro_batch=4,
        tokens=100_000_000_000,
        eval_every=250,
        data=DataConfig(train=("data/train",)),
        optim=OptimConfig(lr=1e-4, min_lr=2e-5, warmup_tokens=1_000_000_000),
        parallel=ParallelConfig(dtype="bfloat16", recompute="selective"),
        checkpoint=CheckpointConfig(every=250, keep=3),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "tiny": tiny,
    CONTINUE: _continue,
    "quickstart_prmoe": quickstart_prmoe,
    "quickstart_dense": quickstart_dense,
    "small_dense": partial(_small, "small_dense", "small-dense"),
    "small_moe": partial(_small, "small_moe", "small-moe"),
    "small_prmoe": partial(_small, "small_prmoe", "small-pr-moe"),
    **{f"wikitext_{name}": partial(_wikitext, name) for name in _ABLATION},
    **{name: partial(_paper, name) for name in _PAPER},
}
