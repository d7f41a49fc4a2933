"""Checkpoints: torch DCP into safetensors shards, written beside, hashed, and renamed when whole.

DCP's own `.metadata` file is a pickle, and its reader unpickles it. So tensors go through DCP's safetensors storage,
whose index is each file's JSON header, and all that is no tensor stands in `manifest.json`. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from .expert_prints import Part, Prints, compare, join, local_parts, stack_shapes
from .manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    Progress,
    digest,
    list_checkpoints,
    read_manifest,
    same_model,
    seal_of,
    step_directory,
    step_of,
    verify,
)
from .stored import check_whole

_UNFINISHED, _ASIDE = "unfinished_", "aside_"


class Checkpointer:
    """Saves and finds the checkpoints of one run directory. Every rank makes one; calls are collective."""

    def __init__(self, directory: Path, model: dict[str, Any], *, keep: int = 2, asynchronous: bool = True) -> None:
        """`model`: the model part of the config, as JSON; a checkpoint of another model is refused."""
        self.directory = directory
        self.model = model
        self.keep = keep
        self.asynchronous = asynchronous
        many = dist.is_initialized() and dist.get_world_size() > 1
        # The background thread talks to the other ranks while the main thread does: it needs its own group.
        self._group: Any = dist.new_group(backend="gloo") if many else None
        self.rank = dist.get_rank() if many else 0
        self.world = dist.get_world_size() if many else 1
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        if self.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for rest in directory.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(rest, ignore_errors=True)
        self._barrier()

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)

    def _agree(self, value: Any) -> list[Any]:
        """Everyone's value, in the order of ranks."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def save(self, state: dict[str, Tensor], progress: Progress) -> str | None:
        """Begins to write `state`; waits for the save before it, and returns that one's failure, if it had one."""
        before = self.wait()
        copy = BlockingAsyncStager(cache_staged_state_dict=False).stage(state)
        self._thread = threading.Thread(target=self._run, args=(copy, progress), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.asynchronous:
            self._thread.join()
        return before

    def wait(self) -> str | None:
        """Waits for a save that is under way; a sentence if it failed, the same on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _run(self, state: dict[str, Any], progress: Progress) -> None:
        try:
            self._error = self._write(state, progress)
        except Exception as error:  # another rank is gone; the main thread will meet the same
            self._error = f"the checkpoint of step {progress.step} was not written: {error}"

    def _write(self, state: dict[str, Any], progress: Progress) -> str | None:
        final = step_directory(self.directory, progress.step)
        unfinished = self.directory / f"{_UNFINISHED}{progress.step:08d}"
        problem = self._attempt(lambda: self._write_shards(unfinished, state))
        files: dict[str, Any] = {}
        parts: list[Part] = []
        if problem is None:
            problem = self._attempt(lambda: files.update(self._hash_own(unfinished)))
        if problem is None:
            problem = self._attempt(lambda: parts.extend(local_parts(state)))
        everyone = self._agree((problem, files, parts))
        problem = next((p for p, *_ in everyone if p), None)
        if problem is None:
            told = {"format": FORMAT, "progress": asdict(progress), "model": self.model}
            told["files"] = {name: entry for _, theirs, _ in everyone for name, entry in theirs.items()}
            own = [part for *_, theirs in everyone for part in theirs]
            problem = self._attempt(lambda: self._publish(unfinished, final, told, join(own, stack_shapes(state))))
            problem = self._agree(problem)[0]
        if problem is None:
            return None
        if self.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        older = list_checkpoints(self.directory)
        kept = f"{older[0].name} is intact" if older else "there is no older one"
        return f"the checkpoint of step {progress.step} was not written: {problem}; {kept}"

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """Runs a part of a save. A failure becomes a sentence, so that all ranks stay in step."""
        try:
            action()
        except CheckpointException as error:
            failure = next(iter(error.failures.values()))[0]
            return str(failure) or type(failure).__name__
        except Exception as error:
            return str(error) or type(error).__name__
        return None

    def _write_shards(self, unfinished: Path, state: dict[str, Any]) -> None:
        writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp_save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)

    def _hash_own(self, unfinished: Path) -> dict[str, Any]:
        """Each rank hashes what it wrote itself (DCP numbers shards from 1)."""
        own = unfinished.glob(f"shard-{self.rank + 1:05d}-*")
        return {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in own}

    def _publish(self, unfinished: Path, final: Path, manifest: dict[str, Any], experts: Prints) -> None:
        if self.rank:
            return
        if not manifest["files"]:
            raise CheckpointError("no shard was found where this machine's ranks wrote: is the run directory shared?")
        self._write_manifest(unfinished, {**manifest, "experts": experts})
        if final.exists():
            _move_aside(final)
        unfinished.rename(final)
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._prune()

    def _write_manifest(self, unfinished: Path, manifest: dict[str, Any]) -> None:
        manifest["seal"] = seal_of(manifest)
        with (unfinished / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _prune(self) -> None:
        for old in list_checkpoints(self.directory)[max(self.keep, 1) :]:
            shutil.rmtree(old, ignore_errors=True)

    def find(self, resume: str) -> tuple[Path | None, list[str]]:
        """What to start from under the setting `resume`, and sentences about damaged checkpoints passed over.

        Raises:
            CheckpointError: the one that was asked for is damaged (offers the newest whole one), or all are.
        """
        if resume == "never":
            return None, []
        candidates = self._agree(list_checkpoints(self.directory))[0]
        if resume != "auto":
            asked = Path(resume)
            problem = self._problem(asked)
            if problem is None:
                return asked, []
            others = self._agree(list_checkpoints(asked.parent) if asked.parent.is_dir() else [])[0]
            whole = next((p for p in others if p.name != asked.name and self._problem(p) is None), None)
            offer = f"the newest whole one is {whole}" if whole else "there is no whole one beside it"
            raise CheckpointError(f"{problem}; {offer}")
        problems = []
        for path in candidates:
            problem = self._problem(path)
            if problem is None:
                return path, problems
            problems.append(problem)
        if problems:
            raise CheckpointError(
                f"{problems[0]}; there is no whole checkpoint in {self.directory}: "
                "give --checkpoint.resume never to start anew"
            )
        return None, []

    def set_aside(self, start: Path | None, step: int) -> list[str]:
        """Takes checkpoints that are not behind `start`, which is at `step`, out of the line, so that none of them
        outlives (as the newest) what this run will write; returns their names."""
        here = start is not None and start.resolve().parent == self.directory.resolve()
        behind = {p for p in list_checkpoints(self.directory) if here and step_of(p) < step}
        own = start.name if start is not None and here else None
        moved = [p for p in list_checkpoints(self.directory) if p not in behind and p.name != own]
        self._barrier()
        if self.rank == 0:
            for path in moved:
                _move_aside(path)
        self._barrier()
        return [p.name for p in moved]

    def _problem(self, path: Path) -> str | None:
        try:
            verify(path, self.rank, self.world)
            mine = None
        except (CheckpointError, OSError) as error:
            mine = str(error)
        return next((p for p in self._agree(mine) if p), None)

    def load(self, path: Path, state: dict[str, Tensor], optional: dict[str, Tensor]) -> tuple[Progress, bool]:
        """Reads a verified checkpoint into the tensors of `state`, in place; `optional` only if all of it is there
        (the second result says so).

        Raises:
            CheckpointError: it holds another model, lacks a tensor or a part of one, or an expert was not read into
                its place; the same on every rank.
        """
        manifest = read_manifest(path)
        same_model(path, manifest["model"], self.model)
        reader = HuggingFaceStorageReader(str(path))
        stored = reader.read_metadata().state_dict_metadata
        missing = sorted(state.keys() - stored.keys())
        if missing:
            raise CheckpointError(f"checkpoint {path} lacks {len(missing)} tensors, the first is {missing[0]}")
        check_whole(path, stored)
        for name, tensor in state.items():
            if stored[name].size != tensor.shape:  # type: ignore[union-attr]
                raise CheckpointError(
                    f"checkpoint {path} holds another model: {name} is {tuple(stored[name].size)} there "  # type: ignore[union-attr]
                    f"and {tuple(tensor.shape)} here"
                )
        whole = all(self._agree(optional.keys() <= stored.keys()))
        wanted = {**state, **optional} if whole else dict(state)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp_load(wanted, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        saved = manifest.get("experts", {})  # an older version saved none
        alike = {n: t for n, t in state.items() if n in saved and stored[n].properties.dtype == t.dtype}  # type: ignore[union-attr]
        self._check_experts(path, saved, alike)
        return Progress(**manifest["progress"]), whole

    def _check_experts(self, path: Path, saved: Prints, state: dict[str, Tensor]) -> None:
        parts = [part for theirs in self._agree(local_parts(state)) for part in theirs]
        compare(path, saved, join(parts, stack_shapes(state)))


def _move_aside(path: Path) -> None:
    aside = path.with_name(f"{_ASIDE}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, persistent buffers and optimizer state under the model's own names. The tensors are live: what is
    read into them is what the run goes on with. A tied parameter stands once."""
    names = {id(p): name for name, p in model.named_parameters()}
    stored = model.state_dict()  # FSDP gives shards here, whatever is gathered at the moment
    own = set(names.values()) | {name for name, _ in model.named_buffers()}
    state = {f"model.{name}": tensor for name, tensor in stored.items() if name in own}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for kind, tensor in optimizer.state[parameter].items():
                state[f"optimizer.{names[id(parameter)]}.{kind}"] = tensor
    return state


def random_state(rank: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's random streams."""
    state = {f"random.{rank}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"random.{rank}.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    for name, tensor in state.items():
        if name.endswith(".cuda"):
            torch.cuda.set_rng_state(tensor.cpu(), device)
        else:
            torch.set_rng_state(tensor)
