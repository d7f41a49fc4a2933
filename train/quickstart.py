"""A small PR-MoE's whole life on this machine, in minutes, without a download: corpus, tokenizer, pretraining under
torchrun, a report and some text. Every stage leaves its file behind, so an interrupted quickstart goes on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from .baselines import baselines
from .config import TrainConfig, from_dict
from .corpus import stdlib_corpus, write_corpus
from .data import build_datasets
from .launch import launch
from .metrics import read_metrics
from .prepare import outputs, prepare
from .report import report

RUNS = {"PR-MoE": "quickstart_prmoe", "dense": "quickstart_dense"}
RANKS = 2
VOCABULARY = 4096
PROMPTS = ("def read_lines(path):\n", "class Stack:\n    def __init__(self", "import os\n")


def quickstart(folder: Path, *, seed: int = 1234) -> None:
    """Runs every stage that has not left its result in `folder` yet, then prints what came out.

    Raises:
        ChildProcessError: A training run did not reach its end; its own output says why.
    """
    start = time.perf_counter()
    folder = Path(folder)
    _stage("1/4  Corpus: the sources of this Python's standard library")
    train, valid = _tokens(folder / "data")
    for number, (name, recipe) in enumerate(RUNS.items(), 2):
        _stage(f"{number}/4  Pretraining the {name} model on {RANKS} ranks ({recipe})")
        _pretrain(recipe, folder / recipe, train, valid, seed)
    _stage("4/4  Results")
    results = _results(folder)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    page = report(*(folder / recipe for recipe in RUNS.values()))
    _show(folder, results, page, time.perf_counter() - start)


def _stage(title: str) -> None:
    print(f"\n{title}", flush=True)


def _tokens(folder: Path) -> tuple[Path, Path]:
    """The prefixes of the training and validation tokens."""
    train, valid = folder / "train", folder / "valid"
    if not all(path.exists() for path in outputs(valid)):
        texts = write_corpus(folder, stdlib_corpus())
        workers = os.cpu_count() or 1
        prepare([texts[0]], train, train_vocab=VOCABULARY, workers=workers, force=True)
        prepare([texts[1]], valid, tokenizer=outputs(train)[0], workers=workers, force=True)
    return train, valid


def _pretrain(recipe: str, run: Path, train: Path, valid: Path, seed: int) -> None:
    done = run / "model" / "config.json"
    if done.exists():
        print(f"{run} is there already")
        return
    leaves = ["--run-dir", run, "--seed", seed, "--data.train", train, "--data.valid", valid]
    code = launch(RANKS, [recipe, *map(str, leaves)])
    if code or not done.exists():
        raise ChildProcessError(f"{recipe} ended early (status {code}): the same command goes on from its checkpoint")


def _results(folder: Path) -> dict[str, Any]:
    """Validation losses in nats per token, of the models and of n-grams fitted on the tokens they were trained on."""
    results: dict[str, Any] = {}
    for name, recipe in RUNS.items():
        rows = read_metrics(folder / recipe)
        last = [row for row in rows if "valid_loss" in row][-1]
        speeds = sorted(row["tokens_per_s"] for row in rows)
        results[name] = {
            "valid_loss": last["valid_loss"],
            "tokens": rows[-1]["tokens"],
            "tokens_per_s": speeds[len(speeds) // 2],
        }
    seen, held = _samples(folder / RUNS["PR-MoE"])
    n_grams = baselines(seen, held, VOCABULARY)._asdict()
    for recipe in RUNS.values():  # the report draws them beside the losses
        (folder / recipe / "baselines.json").write_text(json.dumps(n_grams) + "\n")
    return results | {name: {"valid_loss": loss, "tokens": len(seen)} for name, loss in n_grams.items()}


def _samples(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """All tokens that a run was trained on, and those it was evaluated on."""
    config: TrainConfig = from_dict(json.loads((run / "config.json").read_text()))
    counts = config.total_steps * config.batch_size, config.eval_batches * config.batch_size
    cache = run / "data_cache"
    sets = build_datasets(config.data, config.seq_len, *counts, config.seed, cache=cache)
    parts = (
        np.concatenate([samples[i]["tokens"].numpy() for i in range(count)])
        for samples, count in zip(sets, counts, strict=True)
    )
    return next(parts), next(parts)


def _show(folder: Path, results: dict[str, Any], page: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..infer.pipeline import stream_text

    table = Table("model", "validation loss (nats/token)", "training tokens", "tokens/s")
    for name, row in sorted(results.items(), key=lambda item: item[1]["valid_loss"]):
        speed = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""
        table.add_row(name, f"{row['valid_loss']:.3f}", f"{row['tokens']:,}", speed)
    console = Console()
    console.print(table)
    model = folder / RUNS["PR-MoE"]
    for seed, prompt in enumerate(PROMPTS):
        pieces = stream_text(model, prompt, max_new_tokens=60, device="cpu", temperature=0.7, top_p=0.95, seed=seed)
        console.rule(f"completion {seed + 1}")
        console.print(prompt + "".join(pieces), markup=False, highlight=False)
    console.rule()
    console.print(f"Report: {page}\nWrite more: coterie generate {model} --prompt 'def '", highlight=False)
    console.print(f"{seconds / 60:.1f} minutes", highlight=False)
