"""One pretraining session on this rank: ranks, data, model and loop, put together from a config."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from ..models.gpt import GPT
from ..models.parallelize import parallelize
from ..models.params import count_params, flops_per_token
from ..models.tokenizer import Tokenizer
from ..models.weights import load_weights, save_model
from ..parallel.launch import Ranks, init_ranks
from ..parallel.mesh import build_mesh
from ..parallel.watchdog import Watchdog
from .config import TrainConfig, exchanging, layout, to_dict
from .data import Batch, batches, build_datasets
from .environment import describe_environment
from .export import tokenizer_path
from .initial import same_tokens
from .lives import only_writer
from .loop import Summary, Trainer
from .manifest import CheckpointError
from .objective import LanguageModelling


def run(config: TrainConfig) -> Summary:
    """Opens the ranks, trains, exports `RUN/model`. Every rank calls it.

    Raises:
        ValueError, FileNotFoundError: ranks, data, model or checkpoint do not fit.
        ArithmeticError: the loss stayed not finite.
    """
    device = config.parallel.device
    ranks = init_ranks(None if device == "auto" else device)
    try:
        with only_writer(Path(config.run_dir)) if ranks.first else contextlib.nullcontext():
            return _run(config, ranks)
    finally:
        ranks.shutdown()


def _run(config: TrainConfig, ranks: Ranks) -> Summary:
    _set_up_torch(config, ranks)
    data = Data(config, ranks)
    degrees = config.parallel
    mesh = build_mesh(
        ranks.device.type, dp_replicate=degrees.dp_replicate, tp=degrees.tp, ep=degrees.ep, etp=degrees.etp
    )
    model = parallelize(
        GPT(config.model, device="meta"),
        mesh,
        dtype=getattr(torch, config.parallel.dtype),
        reshard=config.parallel.reshard,
        compile=config.parallel.compile,
        exchanging=exchanging(config, data.micro * config.seq_len // degrees.tp),
    )
    if not config.init:
        model.init_weights(config.seed)
    model.recompute = config.parallel.recompute
    trainer = Trainer(
        model,
        LanguageModelling(),
        data.steps,
        config,
        ranks,
        valid=data.valid,
        flops_per_token=flops_per_token(config.model, config.seq_len),
        order=data.order,
    )
    export = partial(save_model, Path(config.run_dir) / "model", model, data.tokenizer)
    with Watchdog(ranks.rank, config.parallel.timeout_s, Path(config.run_dir) / "hang", trainer.where):
        if not trainer.resume() and config.init:
            load_weights(config.init, model)
            ranks.log.info(f"starts from the weights of {config.init}")
        if ranks.first:
            _describe(config, ranks)
        try:
            summary = trainer.run()
        except CheckpointError:
            if trainer.finished:  # the weights are a third of what did not fit, and are what the run was for
                with contextlib.suppress(OSError):
                    export()
            raise
    if summary.finished:
        export()
    return summary


def _set_up_torch(config: TrainConfig, ranks: Ranks) -> None:
    if ranks.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(config.parallel.threads or max(1, cores // here))
    elif config.parallel.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(config.seed + ranks.rank)


def _describe(config: TrainConfig, ranks: Ranks) -> None:
    """config.json, environment.json, and one line on the terminal."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, facts in (("config", to_dict(config)), ("environment", describe_environment(ranks.world))):
        draft = folder / f".{name}.json.new"
        draft.write_text(json.dumps(facts, indent=1) + "\n")
        draft.replace(folder / f"{name}.json")
    count = count_params(config.model)
    ranks.log.info(
        f"{config.run_dir}: {count.total / 1e6:,.1f}M parameters, {count.activated / 1e6:,.1f}M activated; "
        f"{config.total_steps:,} steps of {config.step_tokens:,} tokens on {ranks.world} {ranks.device.type} "
        f"rank{'s' * (ranks.world > 1)}"
    )


class Data:
    """The token files of a config as this rank's micro-batches; the ranks of a tensor-parallel group get the same."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.layout = layout(config, ranks.world)
        share = config.batch_size // self.layout.data_ranks
        self.micro = config.micro_batch or share
        self.per_step = share // self.micro
        if config.init:
            same_tokens(config.init, config.data)
        self.train_set, self.valid_set = build_datasets(
            config.data,
            config.seq_len,
            config.total_steps * config.batch_size,
            config.eval_batches * config.batch_size,
            config.seed,
            vocab_size=config.model.vocab_size,
            cache=Path(config.run_dir) / "data_cache",
        )

    def steps(self, consumed: int) -> Iterator[list[Batch]]:
        """The rest of the run after so many samples, one list of micro-batches a step."""
        flow = self._flow(self.train_set, consumed)
        while step := list(islice(flow, self.per_step)):
            yield step

    def order(self, consumed: int) -> str:
        """A digest of which samples were the first so many: of those at 0, 1, 2, 4, ... and of the last one."""
        digest = hashlib.sha256()
        for sample in sorted({0, consumed - 1, *(1 << n for n in range(consumed.bit_length()))}):
            if 0 <= sample < consumed:
                digest.update(self.train_set[sample]["tokens"].numpy().tobytes())
        return digest.hexdigest()[:16]

    def valid(self) -> Iterator[Batch]:
        return islice(self._flow(self.valid_set, 0), self.config.eval_batches * self.per_step)

    def _flow(self, dataset: object, start: int) -> Iterator[Batch]:
        config, ranks, layout = self.config, self.ranks, self.layout
        for batch in batches(
            dataset,
            start,
            config.batch_size,
            self.micro,
            ranks.rank // layout.tp,
            layout.data_ranks,
            vocab_size=config.model.vocab_size,  # of large files, parts alone were looked at
        ):
            moved = [None if part is None else part.to(ranks.device, non_blocking=True) for part in batch]
            yield Batch(*moved)  # type: ignore[arg-type]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What the data was made with: named in the config, or beside the first prefix; else that of `init`."""
        paths = [tokenizer_path(self.config.data)]
        paths += [Path(self.config.init) / "tokenizer.json"] if self.config.init else []
        found = [path for path in paths if path.exists()]
        return Tokenizer(found[0]) if found else None
