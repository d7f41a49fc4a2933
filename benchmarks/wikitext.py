"""The paper's ablations on WikiText-2: dense, MoE, residual, pyramid, PR-MoE, first and second half, several seeds.

    python -m coterie.benchmarks.wikitext --text DIR --tokenizer DIR --seeds 3

DIR of --text holds train.txt and valid.txt (or .gz); DIR of --tokenizer holds GPT-2's encoder.json and vocab.bpe, or
a tokenizer.json. Every run is `coterie pretrain wikitext_NAME`; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..train.metrics import read_metrics
from ..train.prepare import outputs, prepare
from .rows import Row, write

NAMES = ("dense", "moe", "top2", "residual", "pyramid", "pr_moe", "first_half", "second_half")


def tokenizer_file(source: Path, folder: Path) -> Path:
    """A tokenizer.json: the one of `source`, or one made there from GPT-2's two files."""
    if (source / "tokenizer.json").exists():
        return source / "tokenizer.json"
    vocabulary, merges = source / "encoder.json", source / "vocab.bpe"
    for path in (vocabulary, merges):
        if not path.exists():
            raise FileNotFoundError(f"{source} has neither tokenizer.json nor {path.name}")
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer(str(vocabulary), str(merges))
    bpe.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def token_files(text: Path, tokenizer: Path, folder: Path) -> dict[str, Path]:
    """The prefixes of the training and validation tokens, made when they are not there."""
    prefixes = {part: folder / part for part in ("train", "valid")}
    made = tokenizer_file(tokenizer, folder)
    for part, prefix in prefixes.items():
        if not all(path.exists() for path in outputs(prefix)):
            found = sorted(text.glob(f"{part}.txt*"))
            if not found:
                raise FileNotFoundError(f"{text} has no {part}.txt or {part}.txt.gz")
            prepare(found[:1], prefix, tokenizer=made, force=True)
    return prefixes


def train(name: str, seed: int, prefixes: dict[str, Path], arguments: argparse.Namespace) -> float:
    """The last validation loss of one run, in nats per token."""
    run = arguments.out / f"{name}-{seed}"
    if not (run / "model" / "config.json").exists():
        data = ["--data.train", prefixes["train"], "--data.valid", prefixes["valid"]]
        leaves = ["--run-dir", run, "--seed", seed, "--steps", arguments.steps, *data, *arguments.leaves]
        # Each run has its own core; two on one would share it badly.
        leaves += ["--parallel.threads", arguments.threads]
        command = [sys.executable, "-m", "coterie.train.pretrain", f"wikitext_{name}", *map(str, leaves)]
        with (arguments.out / f"{name}-{seed}.log").open("w") as log:
            code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT)
        if code:
            raise ChildProcessError(f"{name} with seed {seed} ended with status {code}: see {log.name}")
    return [row["valid_loss"] for row in read_metrics(run) if "valid_loss" in row][-1]


def tidy(losses: dict[str, list[float]], steps: int) -> list[Row]:
    """One row a variant: mean validation loss, and the standard deviation over seeds as its spread."""
    return [
        Row("wikitext", f"{steps} steps", name, "valid_loss", statistics.mean(values), "nats/token", spread(values))
        for name, values in losses.items()
    ]


def spread(values: list[float]) -> float | None:
    """Standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains what is missing, `--jobs` runs at a time, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/wikitext"))
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--json", type=Path)
    arguments, arguments.leaves = parser.parse_known_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    prefixes = token_files(arguments.text, arguments.tokenizer, arguments.out / "data")
    cases = [(name, seed) for seed in range(1, arguments.seeds + 1) for name in arguments.names]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda case: train(case[0], case[1], prefixes, arguments), cases))
    losses: dict[str, list[float]] = {name: [] for name in arguments.names}
    for (name, _), loss in zip(cases, results, strict=True):
        losses[name].append(loss)
    for name, values in losses.items():
        around = f" +- {spread(values):.4f}" if len(values) > 1 else ""
        print(f"{name:<12} {statistics.mean(values):.4f}{around}  {[round(v, 4) for v in values]}")
    if arguments.json:
        write(tidy(losses, arguments.steps), arguments.json)
    return losses


if __name__ == "__main__":
    main()
