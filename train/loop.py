"""The one training loop. It is given a model, an objective and data; distillation, SFT and PPO give it others."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..moe.gate import Stats, seed_noise
from ..moe.metrics import add, pack, unpack
from ..parallel.collectives import all_reduce_sum
from ..parallel.launch import Ranks
from .checkpoint import Checkpointer, random_state, set_random_state, training_state
from .clock import Clock, dispatch_traffic, peak_of_all
from .config import TrainConfig, to_dict
from .faults import StopRequest, first_bad_layer
from .manifest import CHECKPOINTS, CheckpointError, Progress, same_order
from .metrics import MetricsWriter, Totals, router_row
from .objective import Objective, total
from .optim import build_optimizer, learning_rate, local_square_sum, scale_gradients, set_learning_rate

Steps = Callable[[int], Iterator[list[Any]]]
"""From the number of consumed samples, the rest of the run: this rank's micro-batches of one step after another."""


class Summary(NamedTuple):
    """How a run ended."""

    progress: Progress
    finished: bool
    """False: a signal stopped it; it was saved."""
    valid_loss: float | None


class Trainer:
    """Trains a parallelized (or plain) model on this rank; every rank makes one with the same config.

    Args:
        model: with weights; `parallelize` has given it its mesh.
        objective: losses and counts of a micro-batch.
        steps: the data, see `Steps`.
        valid: one evaluation's micro-batches, the same at every call; None: no evaluation.
        flops_per_token: forward and backward, for the utilisation figure.
        order: of a number of samples, a digest of which ones they are; a run whose data has changed is not resumed.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        steps: Steps,
        config: TrainConfig,
        ranks: Ranks,
        *,
        valid: Callable[[], Iterable[Any]] | None = None,
        flops_per_token: float = 0.0,
        order: Callable[[int], str] = lambda samples: "",
    ) -> None:
        self.model, self.objective, self.steps, self.config, self.ranks = model, objective, steps, config, ranks
        self.valid = valid if config.eval_batches else None
        self.flops_per_token, self.order = flops_per_token, order
        self.optimizer = build_optimizer(model, config.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.clock = Clock(ranks.device, dispatch_traffic(model))
        self.checkpoints = Checkpointer(
            Path(config.run_dir) / CHECKPOINTS,
            to_dict(config)["model"],
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
        )
        self.progress = Progress(world=ranks.world)
        self.bad_in_a_row = 0
        self._per: dict[str, str] = {}
        self._counted: list[str] = []
        self._failed: tuple[list[Any], dict[str, float]] = ([], {})

    def run(self) -> Summary:
        """Trains from where `resume` put the run to its last step, or until a signal; saves.

        Raises:
            CheckpointError: the last save failed.
            ValueError: the data ended before the run.
            ArithmeticError: too many steps in a row were not finite.
        """
        config, valid_loss, stop = self.config, None, False
        peak = peak_of_all(self.ranks.device, getattr(torch, config.parallel.dtype))
        with self._writer() as writer, StopRequest() as request:
            data = iter(self.steps(self.progress.samples))
            while not self.finished and not stop:
                begin = time.perf_counter()
                totals = self.step(data, request.signal > 0)
                stop, seconds = totals.stop, time.perf_counter() - begin
                row = self._row(totals, seconds, peak)
                if self.valid is not None and self._due(config.eval_every) and not stop:
                    row["valid_loss"] = valid_loss = self.evaluate()
                if writer is not None:
                    writer.write(row, total_steps=config.total_steps)
                if self.bad_in_a_row >= config.max_bad_steps:
                    self._give_up()
                if stop or self._due(config.checkpoint.every):
                    self.save()
            problem = self.checkpoints.wait()
        if problem:
            raise CheckpointError(problem)
        if stop:
            name = signal.Signals(request.signal).name if request.signal else "a signal on another rank"
            self.ranks.log.info(f"{name}: saved at step {self.progress.step}; the same command goes on from there")
        return Summary(self.progress, self.finished, valid_loss)

    def where(self) -> str:
        """Where the run stands, for a sentence."""
        span = self.clock.current
        return f"at step {self.progress.step + 1}{f' in {span}' if span else ''}"

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.config.total_steps

    def _writer(self) -> contextlib.AbstractContextManager[MetricsWriter | None]:
        """Rank 0's, closed also when the run fails."""
        if not self.ranks.first:
            return contextlib.nullcontext()
        log, folder = self.config.log, Path(self.config.run_dir)
        return contextlib.closing(
            MetricsWriter(folder, start=self.progress.step, every=log.every, tensorboard=log.tensorboard)
        )

    def _row(self, totals: Totals, seconds: float, peak: float) -> dict[str, Any]:
        pace = self.config.step_tokens / seconds
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": next(iter(totals.losses.values())),
            **totals.losses,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": totals.norm,
            "tokens_per_s": pace,
            "mfu": self.flops_per_token * pace / peak,
            **router_row(totals.stats),
            "layers": [i for i, experts in enumerate(self.config.model.experts) if experts],
            **self.clock.row(),
            "skipped": self.progress.skipped,
            "bad": not totals.finite,
        }

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return step == self.config.total_steps or (every > 0 and step % every == 0)

    def step(self, data: Iterator[list[Any]], stop: bool = False) -> Totals:
        """One optimizer step; if its numbers are not finite the model stays as it was, on all ranks alike.

        `stop`: this rank wants to end the run; all ranks learn of it in the totals.
        """
        config = self.config
        with self.clock.span("data"):
            batches = next(data, [])
            counts = self._global_counts(batches)
        self.model.train()
        seed_noise(self.model, config.seed, self.progress.step, self.ranks.rank)
        self.optimizer.zero_grad(set_to_none=True)
        sums, stats = self._accumulate(batches, counts)
        with self.clock.span("optimizer"):
            totals = self._reduce(sums, stats, counts, stop)
            done = replace(
                self.progress,
                step=self.progress.step + 1,
                tokens=self.progress.tokens + config.step_tokens,
                samples=self.progress.samples + config.batch_size,
            )
            if totals.finite:
                self._update(totals, done.tokens)
                self.bad_in_a_row = 0
            else:
                done = replace(done, skipped=done.skipped + 1)
                self.bad_in_a_row += 1
                self._failed = batches, counts
                self.optimizer.zero_grad(set_to_none=True)
        self.progress = done
        return totals

    def _global_counts(self, batches: list[Any]) -> dict[str, float]:
        """The counts of the step's terms over all ranks.

        Raises:
            ValueError: on every rank, when the data of one has ended.
        """
        parts = [self.objective.counts(batch) for batch in batches]
        self._counted = list(parts[0]) if parts else self._counted
        local = [sum((part[n].double() for part in parts), torch.zeros(())) for n in self._counted]
        told = torch.stack([torch.tensor(float(not parts)), *local]).double()
        ended, *counts = all_reduce_sum(told.to(self.ranks.device)).tolist()
        if ended:
            where = f"step {self.progress.step} of {self.config.total_steps}, at {self.progress.samples} samples"
            raise ValueError(f"the data ended after {where}: keep the batch_size of the run, or give more steps")
        copies = self.config.parallel.tp  # ranks that have the same batch
        return {name: count / copies for name, count in zip(self._counted, counts, strict=True)}

    def _accumulate(
        self, batches: list[Any], counts: dict[str, float]
    ) -> tuple[dict[str, Tensor], tuple[Stats, ...]]:
        """Forward and backward of all micro-batches; sums of the terms and of the router's statistics."""
        sums: dict[str, Tensor] = {}
        stats: tuple[Stats, ...] = ()
        for i, batch in enumerate(batches):
            self._sync_gradients(self.config.parallel.sync_every_micro or i == len(batches) - 1)
            history = tuple(s.asked_E for s in stats) if stats else None
            with self.clock.span("forward"):
                losses = self.objective(self.model, batch, history)
                loss = total(losses.terms, counts)
            with self.clock.span("backward"):
                loss.backward()
            for name, term in losses.terms.items():
                value = term.value.detach().double()
                sums[name] = sums[name] + value if name in sums else value
            self._per = {name: term.per for name, term in losses.terms.items()}
            stats = add(stats, losses.stats) if stats else losses.stats
        return sums, stats

    def _sync_gradients(self, sync: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(sync)

    def _reduce(
        self, sums: dict[str, Tensor], stats: tuple[Stats, ...], counts: dict[str, float], stop: bool
    ) -> Totals:
        """One all-reduce and one copy to the host for all that a step must know of the other ranks."""
        device = self.ranks.device
        square = local_square_sum(self.parameters, self.ranks.world).to(device)
        flag = torch.full((), float(stop), dtype=torch.float64, device=device)
        head = torch.stack([square, flag, *sums.values()])
        values = all_reduce_sum(torch.cat([head, pack(stats).to(device)])).cpu()
        losses = {
            n: v / max(counts[self._per[n]], 1) for n, v in zip(sums, values[2 : len(head)].tolist(), strict=True)
        }
        layers = unpack(values[len(head) :], stats)
        return Totals(math.sqrt(values[0]) if values[0] >= 0 else math.nan, losses, layers, bool(values[1]))

    def _update(self, totals: Totals, tokens: int) -> None:
        config = self.config
        clip = config.optim.clip
        if clip and totals.norm > clip:
            scale_gradients(self.parameters, clip / totals.norm)
        set_learning_rate(
            self.optimizer, learning_rate(config.optim, tokens, config.total_steps * config.step_tokens)
        )
        self.optimizer.step()
        update = getattr(self.model, "update_biases", None)
        if update is not None and totals.stats:
            update(tuple(s.asked_E.to(self.ranks.device) for s in totals.stats))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean of the objective's first term over the validation batches, in eval mode; training sees none of it."""
        assert self.valid is not None
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for batch in self.valid():
            term = next(iter(self.objective(self.model, batch, None).terms.values()))
            sums += torch.stack([term.value.double(), self.objective.counts(batch)[term.per].to(sums)])
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # no backward pass will free what the forward pass has gathered
                module.reshard()
        self.model.train()
        self.clock.forget_all_to_all()
        total, count = all_reduce_sum(sums).tolist()
        return total / max(count / self.config.parallel.tp, 1)  # a tensor-parallel group's ranks count the same

    def resume(self) -> bool:
        """Loads what the setting `checkpoint.resume` asks for; False: there is nothing, the run begins.

        Raises:
            CheckpointError: it is damaged, or holds another model.
        """
        path, passed = self.checkpoints.find(self.config.checkpoint.resume)
        log, device = self.ranks.log, self.ranks.device
        if self.ranks.first:
            for problem in passed:
                log.warning(f"{problem}; passing over it")
        if path is not None:
            noise = random_state(self.ranks.rank, device)
            stored, whole = self.checkpoints.load(path, training_state(self.model, self.optimizer), noise)
            if whole and stored.world == self.ranks.world:
                set_random_state(noise, device)
            if self.config.checkpoint.resume == "auto":
                same_order(path, stored, self.order(stored.samples))
            self.progress = replace(stored, world=self.ranks.world)
            log.info(f"resumed from {path}, step {stored.step}")
        for name in self.checkpoints.set_aside(path, self.progress.step):
            log.info(f"{name} is not behind the start of this run: renamed to aside_{name}")
        return path is not None

    def save(self) -> None:
        """Begins a checkpoint. One that could not be written is told of; the run goes on without it."""
        state = training_state(self.model, self.optimizer) | random_state(self.ranks.rank, self.ranks.device)
        order = self.order(self.progress.samples) if self.ranks.first else ""
        problem = self.checkpoints.save(state, replace(self.progress, order=order))
        if problem and self.ranks.first:
            self.ranks.log.warning(problem)

    def _give_up(self) -> NoReturn:
        batches, counts = self._failed

        def run() -> Tensor:
            return torch.stack(
                [total(self.objective(self.model, batch, None).terms, counts) for batch in batches]
            ).sum()

        layer = first_bad_layer(self.model, run)
        self.checkpoints.wait()
        raise ArithmeticError(
            f"loss or gradient norm was not finite in {self.bad_in_a_row} steps in a row, the last is step "
            f"{self.progress.step}; the first bad numbers are in {layer}; lower optim.lr or look at the data there, "
            "and start again from the last checkpoint"
        )
