"""The `coterie` command: parses its arguments and calls the entry that does the work. It holds no logic."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import tyro

from . import cli_bench
from .cli_models import convert, export, generate, upcycle
from .cli_serve import serve

Text = tyro.conf.Positional


def quickstart(folder: Path = Path("quickstart"), seed: int = 1234) -> None:
    """Train a small PR-MoE and its dense twin on Python's own sources, on this machine, and let it write.

    Args:
        folder: Where data, runs and reports go; an interrupted quickstart goes on from there.
        seed: Seed of the models and of the sample order.
    """
    from .train.quickstart import quickstart as run

    run(folder, seed=seed)


def prepare(
    inputs: Text[list[str]],
    output: Path,
    tokenizer: Path | None = None,
    train_vocab: int | None = None,
    field: str = "text",
    split: Literal["file", "line", "blank"] = "file",
    workers: int = 0,
    force: bool = False,
) -> None:
    """Turn text, JSONL or parquet into token files that training reads.

    Args:
        inputs: Files, folders, globs, or - for standard input; .gz is read as it is.
        output: Prefix of what is written: OUTPUT.bin, OUTPUT.idx and OUTPUT.tokenizer.json.
        tokenizer: A tokenizer.json to encode with.
        train_vocab: Instead of that, train a byte-level BPE of this many tokens on the input.
        field: The field of JSONL and parquet rows that holds the text.
        split: What a document is in a plain text file: the file, a line, or a part between blank lines.
        workers: Processes; 0 means one per core.
        force: Overwrite what is there.
    """
    from .train.prepare import prepare as run

    run(
        inputs,
        output,
        tokenizer=tokenizer,
        train_vocab=train_vocab,
        field=field,
        split=split,
        workers=workers or os.cpu_count() or 1,
        force=force,
    )


def pretrain(
    recipe: Text[str],
    overrides: Text[list[str]],
    ranks: int = 1,
    restarts: int = 0,
) -> None:
    """Pretrain a model: short for `torchrun --nproc-per-node RANKS -m coterie.train.pretrain RECIPE ...`.

    Args:
        recipe: A recipe's name; `coterie pretrain RECIPE --help` lists every leaf that can be overridden.
        overrides: --leaf value pairs, handed on.
        ranks: Processes on this machine.
        restarts: How often to start them again, from the newest checkpoint, when one has failed or was killed.
    """
    from .train.launch import launch

    raise SystemExit(launch(ranks, [recipe, *overrides], restarts))


def plan(
    recipe: Text[str],
    overrides: Text[list[str]],
    gpus: int,
    gpu: str,
    node: int = 8,
    json: Path | None = None,
    rows: int = 15,
) -> None:
    """Predict memory, traffic and step time of every layout of a recipe, and print the command of the fastest.

    Args:
        recipe: A recipe's name; `coterie pretrain RECIPE --help` lists every leaf that can be overridden.
        overrides: --leaf value pairs; --parallel.tp and its like fix a degree.
        gpus: How many, in all.
        gpu: Which: a100-40, a100-80, h100, h200, b200, or cpu.
        node: GPUs of one host.
        json: Write every layout that fits here too, one record each.
        rows: How many layouts to print.
    """
    from .train.plan_table import main as run

    run(recipe, overrides, gpus=gpus, gpu=gpu, node=node, json=json, rows=rows)


def report(runs: Text[list[Path]]) -> None:
    """Write one self-contained HTML page about a run (or several, compared).

    Args:
        runs: Run directories; the page is written into the first.
    """
    from .train.report import report as run

    print(run(runs[0], *runs[1:]))


def bench() -> None:
    """Measure side by side: a layer, a training step, decoding, a server under load; `coterie bench` lists them."""


COMMANDS = {
    f.__name__: f
    for f in (quickstart, prepare, pretrain, plan, generate, convert, export, upcycle, serve, report, bench)
}


def _split(argv: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The flags of these names belong to us wherever they stand; all else is the recipe's."""
    own, rest, words = {}, [], iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name in names:
            own[name[2:]] = value or next(words, "")
        else:
            rest.append(word)
    return own, rest


def _pretrain(argv: list[str]) -> None:
    whats = {"ranks": "processes: give 1 or more", "restarts": "restarts: give 0 or more"}
    own, rest = _split(argv, tuple(f"--{name}" for name in whats))
    for name, value in own.items():
        if not value.isdigit():
            raise ValueError(f"--{name} {value!r} is not a number of {whats[name]}")
    pretrain(rest[0] if rest else "", rest[1:], **{name: int(value) for name, value in own.items()})


def _plan(argv: list[str]) -> None:
    own, rest = _split(argv, ("--gpus", "--gpu", "--node", "--json", "--rows"))
    for name in ("gpus", "gpu"):
        if name not in own:
            raise ValueError(f"plan needs --{name}: `coterie plan RECIPE --gpus 256 --gpu h200 --node 8`")
    for name in ("gpus", "node", "rows"):
        if not own.get(name, "1").isdigit():
            raise ValueError(f"--{name} {own[name]!r} is not a number: give 1 or more")
    numbers = {name: int(own[name]) for name in ("node", "rows") if name in own}
    json = Path(own["json"]) if "json" in own else None
    plan(rest[0] if rest else "", rest[1:], int(own["gpus"]), own["gpu"], json=json, **numbers)


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a user's error is one sentence on standard error and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["bench"]:
            cli_bench.main(argv[1:])
            return
        takes_a_recipe = {"pretrain": _pretrain, "plan": _plan}.get(argv[0] if argv else "")
        if takes_a_recipe and len(argv) > 1 and argv[1] not in ("-h", "--help"):
            takes_a_recipe(argv[1:])
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="coterie", args=argv, description=__doc__)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("COTERIE_TRACEBACK"):
            raise
        print(f"coterie: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
