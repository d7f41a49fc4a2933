"""Pretrain a model: `torchrun --nproc-per-node N -m coterie.train.pretrain RECIPE [--leaf value]`, or one process."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import TrainConfig, check, to_dict
from .manifest import CHECKPOINTS, refuse_other_model
from .recipes import CONTINUE, RECIPES

USAGE = """usage: python -m coterie.train.pretrain RECIPE [--leaf value ...]

Pretrains a model, alone or under torchrun. A run directory that holds checkpoints goes on from the newest.
`RECIPE --help` lists every leaf of a recipe. Recipes:"""
REFUSED = 2
"""The exit status of a rank that has told why the run cannot be: a restart would tell the same."""
PATIENCE = 10.0
"""Seconds that a rank waits before it tells its error: another rank may be the one to tell."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry: 0 when the run is done or was stopped by a signal, REFUSED when the user is told why it cannot be,
    1 when another rank is lost."""
    first = _first_rank()
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        if config is not None:
            pretrain(config)
    except (ValueError, ArithmeticError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("COTERIE_TRACEBACK"):
            raise
        if not first:
            # Mostly all fail alike: rank 0 speaks, and torchrun ends this one before it says the same.
            time.sleep(PATIENCE)
        print(f"coterie: {_sentence(error)}", file=sys.stderr, flush=True)
        return REFUSED
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        # Most likely a collective with a rank that failed and has told why: torchrun ends this one meanwhile.
        time.sleep(2 * PATIENCE)
        if not any(name in str(error) for name in ("gloo", "NCCL")) or os.environ.get("COTERIE_TRACEBACK"):
            raise
        print(f"coterie: rank {os.environ['RANK']} has lost another rank: {_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the loop, which handles signals itself
        return 130
    return 0


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def parse(arguments: Sequence[str]) -> TrainConfig | None:
    """The config of a command line; None when help was asked for and given.

    Raises:
        ValueError: an unknown recipe or leaf (with the nearest ones), or a value that does not fit.
    """
    first = _first_rank()
    if not arguments or arguments[0] in ("-h", "--help"):
        if first:
            print(USAGE)
            for name in RECIPES:
                print(f"  {name}")
        return None
    name, *rest = arguments
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}{_nearest(name, RECIPES)}; --help lists all")
    return _override(name, rest, first)


def _override(name: str, arguments: list[str], first: bool) -> TrainConfig | None:
    import tyro

    trouble = io.StringIO()
    default = RECIPES[name]()
    init = _given(arguments, "--init") or default.init
    if init:
        from ..models.hub import resolve
        from .initial import settings

        init = str(resolve(init))
        default = replace(default, init=init, model=settings(init))
    try:
        with contextlib.redirect_stderr(trouble):
            config, unknown = tyro.cli(
                TrainConfig,
                default=default,
                args=arguments,
                prog=f"pretrain {name}",
                return_unknown_args=True,
                console_outputs=first or "--help" not in arguments,
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as leave:
        if not leave.code:
            return None
        raise ValueError(_plain(trouble.getvalue())) from None
    if unknown:
        flag = next((a for a in unknown if a.startswith("-")), unknown[0])
        leaves = [f"--{leaf}" for leaf in _leaves(to_dict(config)) if f"--{leaf}" != flag]
        near = _nearest(flag.replace("_", "-"), leaves)
        raise ValueError(f"recipe {name} has no option {flag}{near}; --help lists all")
    if init:
        from .initial import refuse_other

        refuse_other(init, default.model, config.model)
        config = replace(config, init=init)
    elif name == CONTINUE:
        raise ValueError(f"recipe {name} goes on from a model: give its directory with --init")
    return config


def _given(arguments: Sequence[str], flag: str) -> str:
    """The value of a flag that must be known before the others are read; "": it is not there."""
    found = ""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else after
    return found


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        path = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.")
        else:
            yield path


def _nearest(word: str, words: Any) -> str:
    near = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f"; the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else ""


def _plain(boxed: str) -> str:
    """tyro draws a box around a sentence and adds help; the sentence is enough."""
    lines = [line.strip(" │╭╮╰╯─┃-") for line in boxed.splitlines()]
    kept: list[str] = []
    for line in lines[1:]:
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        kept.append(line)
    return " ".join(line for line in kept if line) or "the command line was not understood"


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def pretrain(config: TrainConfig) -> None:
    """Runs a config on this rank, from its checkpoint if there is one, and exports `RUN/model` at the end.

    Raises:
        ValueError, FileNotFoundError: what was given cannot run; one sentence, before any compute is spent.
        ArithmeticError: the loss stayed not finite.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdecimal() or int(world) < 1:
        raise ValueError(f"WORLD_SIZE={world!r} is not a number of ranks: start the run with torchrun")
    refuse(config, int(world))
    # torch and the rest take seconds to import: a wrong flag is told before.
    from . import session

    session.run(config)


def refuse(config: TrainConfig, world: int) -> None:
    """What can be told to be wrong without ranks, data and torch.

    Raises:
        ValueError: a config that does not fit, by itself or on so many ranks, or a checkpoint of another model.
    """
    check(config, world)
    refuse_other_model(Path(config.run_dir) / CHECKPOINTS, config.checkpoint.resume, to_dict(config)["model"])


if __name__ == "__main__":
    sys.exit(main())
