"""Checkpoints: bit for bit back, on other ranks too; damaged, foreign and half-written ones; a full disk."""

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import build, small_config, small_model
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from coterie.models.parallelize import parallelize
from coterie.models.weights import full_state_dict
from coterie.parallel.mesh import build_mesh
from coterie.train import checkpoint as checkpoint_file
from coterie.train.checkpoint import Checkpointer, random_state, training_state
from coterie.train.config import OptimConfig, to_dict
from coterie.train.manifest import (
    CheckpointError,
    Progress,
    list_checkpoints,
    read_manifest,
    refuse_other_model,
    same_model,
    seal_of,
    verify,
)
from coterie.train.optim import build_optimizer

MODEL = {"layers": 3, "moe": {"top_k": 2, "gate": {"aux_weight": 0.1}}}


def tensors(fill: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.arange(35.0).reshape(5, 7) * fill,
        "model.half": torch.full((3,), 0.1 * fill, dtype=torch.bfloat16),
        "model.scalar": torch.tensor(3.5 * fill),
        "random.0.cpu": torch.arange(9, dtype=torch.uint8),
    }


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(t) for name, t in tensors().items()}


def saved(folder: Path, *steps: int, keep: int = 5) -> Checkpointer:
    checkpoints = Checkpointer(folder, MODEL, keep=keep)
    for step in steps:
        assert checkpoints.save(tensors(step), Progress(step=step, tokens=10 * step, samples=step)) is None
    assert checkpoints.wait() is None
    return checkpoints


def shard(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def test_round_trip_is_bitwise_and_unpickles_nothing(tmp_path: Path, monkeypatch) -> None:
    checkpoints = saved(tmp_path, 4)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for module, name in (("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("torch", "load")):
        monkeypatch.setattr(f"{module}.{name}", refuse)
    path, problems = checkpoints.find("auto")
    assert path == tmp_path / "step_00000004"
    assert problems == []
    state = blank()
    progress, whole = checkpoints.load(path, state, {})
    assert progress == Progress(step=4, tokens=40, samples=4)
    assert whole
    for name, tensor in tensors(4).items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".safetensors"]


def test_saving_is_asynchronous_and_takes_a_copy(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, MODEL)
    state = tensors()
    checkpoints.save(state, Progress(step=1))
    for tensor in state.values():
        tensor.zero_()  # the next step writes into the live tensors at once
    assert checkpoints.wait() is None
    loaded = blank()
    checkpoints.load(tmp_path / "step_00000001", loaded, {})
    assert torch.equal(loaded["model.w"], tensors()["model.w"])


def test_the_newest_stay(tmp_path: Path) -> None:
    saved(tmp_path, 3, 10, 9_999_999, 20_000_000, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_20000000", "step_09999999"]


def _truncate(path: Path) -> None:
    file = shard(path)
    file.write_bytes(file.read_bytes()[:-3])


def _alter(path: Path) -> None:
    file = shard(path)
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def _edit_manifest(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["progress"]["samples"] = 99
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "bytes, not": _truncate,
    "content of .*safetensors was altered": _alter,
    "manifest.json was altered": _edit_manifest,
    "manifest.json is not JSON": lambda p: (p / "manifest.json").write_text('{"format"'),
    "has no manifest.json": lambda p: (p / "manifest.json").unlink(),
    "safetensors is missing": lambda p: shard(p).unlink(),
    "extra.safetensors does not belong": lambda p: shutil.copy(shard(p), p / "extra.safetensors"),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_damage_is_refused_by_name_and_the_newest_whole_one_offered(reason: str, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    bad = tmp_path / "step_00000003"
    DAMAGE[reason](bad)
    with pytest.raises(CheckpointError, match=reason) as error:
        verify(bad)
    assert str(bad) in str(error.value)
    with pytest.raises(CheckpointError, match=r"step_00000003 is damaged.*newest whole one is .*step_00000002"):
        checkpoints.find(str(bad))
    path, problems = checkpoints.find("auto")
    assert path == tmp_path / "step_00000002"
    assert len(problems) == 1
    assert "step_00000003 is damaged" in problems[0]
    assert checkpoints.set_aside(path, 2) == ["step_00000003"]
    assert (tmp_path / "aside_step_00000003").is_dir(), "a person may still want to look at it"


def test_no_whole_checkpoint_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    _alter(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*resume never"):
        checkpoints.find("auto")
    assert checkpoints.find("never") == (None, [])
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere; there is no whole one"):
        checkpoints.find(str(tmp_path / "nowhere" / "nowhere"))


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    path = tmp_path / "step_00000001"
    other = {**MODEL, "moe": {"top_k": 1, "gate": {"aux_weight": 0.1}}}
    with pytest.raises(CheckpointError, match=r"another model: model.moe.top_k is 2 there and 1 here"):
        Checkpointer(tmp_path, other).load(path, blank(), {})
    with pytest.raises(CheckpointError, match=r"another model: model.moe.top_k"):
        refuse_other_model(tmp_path, "auto", other)
    same_model(path, MODEL, {**MODEL, "moe": {"top_k": 2, "gate": {"aux_weight": 0.5}}})  # how it trains may change
    checkpoints = Checkpointer(tmp_path, MODEL)
    with pytest.raises(CheckpointError, match=r"model.w is \(5, 7\) there and \(5, 8\) here"):
        checkpoints.load(path, {"model.w": torch.zeros(5, 8)}, {})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, the first is model\.v"):
        checkpoints.load(path, {**blank(), "model.v": torch.zeros(2)}, {})


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "step_00000001" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["format"] = 7
    manifest["seal"] = seal_of(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 7; this version reads 2"):
        read_manifest(file.parent)


class FullDisk:
    """A stream on a disk with `room` bytes left."""

    def __init__(self, stream: Any, room: int) -> None:
        self._stream, self._room = stream, room

    def write(self, data: bytes) -> int:
        if len(data) > self._room:
            self._stream.write(data[: self._room])
            raise OSError(errno.ENOSPC, "No space left on device")
        self._room -= len(data)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.mark.parametrize("where", ["shard", "manifest"])
def test_a_full_disk_leaves_the_old_ones_and_says_so(where: str, tmp_path: Path, monkeypatch) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)
    if where == "shard":
        real = FileSystem.create_stream

        @contextlib.contextmanager
        def full(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
            with real(self, path, mode) as stream:
                yield FullDisk(stream, 100)

        monkeypatch.setattr(FileSystem, "create_stream", full)
    else:

        def full_json(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoint_file.json, "dump", full_json)
    checkpoints.save(tensors(2), Progress(step=2))
    problem = checkpoints.wait()
    assert problem is not None
    assert "step 2 was not written" in problem
    assert "No space left on device" in problem
    assert "step_00000001 is intact" in problem
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"], "the unfinished one is gone"
    verify(tmp_path / "step_00000001")
    monkeypatch.undo()
    checkpoints.save(tensors(3), Progress(step=3))  # room again: it goes on
    assert checkpoints.wait() is None
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000003"]


def test_what_a_killed_save_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "unfinished_00000007").mkdir(parents=True)
    (tmp_path / "unfinished_00000007" / "shard-00001-x.safetensors").write_bytes(b"half")
    assert Checkpointer(tmp_path, MODEL).find("auto") == (None, [])
    assert list(tmp_path.iterdir()) == []


def _state(rank: int, world: int, ep: int, folder: str, seed: int):
    config = small_config(Path(folder), small_model(bias_update=0.01))
    model = build(config.model, seed)
    if world > 1:
        model = parallelize(build(config.model, seed), build_mesh("cpu", ep=ep))
    optimizer = build_optimizer(model, OptimConfig())
    return model, training_state(model, optimizer), to_dict(config)["model"]


def _save_on_ranks(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    model, state, shape = _state(rank, world, 2, folder, 11)
    moments = sorted(n for n in state if n.startswith("optimizer."))  # groups lie in another order elsewhere
    for i, tensor in enumerate(state[n] for n in moments):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.fill_(i)
    for _, buffer in model.named_buffers():
        buffer.copy_(torch.arange(buffer.numel()))
    torch.manual_seed(100 + rank)
    checkpoints = Checkpointer(Path(folder), shape)
    checkpoints.save(state | random_state(rank, torch.device("cpu")), Progress(step=5, world=world))
    assert checkpoints.wait() is None
    noise = random_state(rank, torch.device("cpu"))
    kept = noise[f"random.{rank}.cpu"].clone()
    noise[f"random.{rank}.cpu"].zero_()
    other, fresh, _ = _state(rank, world, 4, folder, 12)  # another layout of the same four ranks
    path, _ = checkpoints.find("auto")
    assert path is not None
    progress, whole = checkpoints.load(path, fresh, noise)
    assert whole
    assert progress.step == 5
    assert torch.equal(noise[f"random.{rank}.cpu"], kept), "each rank gets its own random state back"
    return full_state_dict(other)


@pytest.mark.dist
def test_saved_on_four_ranks_loaded_on_others(tmp_path: Path) -> None:
    """Experts over ep 2 x edp 2, read at ep 4 by the same ranks and whole by one: every value bit for bit."""
    there = run_ranks(_save_on_ranks, 4, str(tmp_path))[0]
    model, state, shape = _state(0, 1, 1, str(tmp_path), 12)
    expected = build(model.config, 11)
    for _, buffer in expected.named_buffers():
        buffer.copy_(torch.arange(buffer.numel()))
    checkpoints = Checkpointer(tmp_path, shape)
    path, problems = checkpoints.find("auto")
    assert path is not None
    assert problems == []
    _, whole = checkpoints.load(path, state, {"random.4.cpu": torch.zeros(1, dtype=torch.uint8)})
    assert not whole, "rank 4 did not exist"
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(there[name], tensor), name
    moments = [state[n] for n in sorted(state) if n.startswith("optimizer.")]
    assert len(moments) == 3 * len(list(model.parameters()))
    for i, tensor in enumerate(moments):
        assert torch.equal(tensor, torch.full_like(tensor, i))
