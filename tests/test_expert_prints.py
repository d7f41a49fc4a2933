"""Every expert is loaded once, whole and into its own place; one that is not is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import build, small_config
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.parallel.mesh import build_mesh
from coterie.train.checkpoint import Checkpointer, training_state
from coterie.train.config import OptimConfig, to_dict
from coterie.train.expert_prints import Part, join, local_parts, print_rows
from coterie.train.manifest import CheckpointError, Progress, digest, read_manifest, seal_of, verify
from coterie.train.optim import build_optimizer

STACK = "model.blocks.2.moe.experts.w_in"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 7), (2, 3, 5, 4)])
def test_parts_add_up_however_an_expert_is_cut(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = torch.randn(shape).to(dtype)
    expected = print_rows(whole, shape[1:])
    assert len(set(expected)) == shape[0]
    for axis in range(1, len(shape)):
        total = [0] * shape[0]
        for part, start in zip(whole.split([1, shape[axis] - 1], axis), (0, 1), strict=True):
            starts = [start if a == axis else 0 for a in range(1, len(shape))]
            total = [(t + p) % 2**64 for t, p in zip(total, print_rows(part, shape[1:], starts), strict=True)]
        assert total == expected, f"cut along axis {axis}"


def test_a_large_expert_is_printed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 9, 11)
    expected = print_rows(values, (9, 11))
    monkeypatch.setattr("coterie.train.expert_prints._AT_ONCE", 20)
    assert print_rows(values, (9, 11)) == expected


def test_a_print_knows_places_and_bits() -> None:
    values = torch.randn(1, 6, 5)
    expected = print_rows(values, (6, 5))
    changed = values.clone()
    changed[0, 3, 2] = torch.nextafter(changed[0, 3, 2], torch.tensor(9.0))
    for other in (changed, values.roll(1, 1), values.roll(1, 2), values.flip(1)):
        assert print_rows(other, (6, 5)) != expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts[:-1], "hold 10 of the 20 elements of expert 1 of w"),
        (lambda parts: [*parts, Part("w", 0, ((1, 3), (0, 5)), 3)], "hold 30 of the 20 elements of expert 0 of w"),
        (lambda parts: [*parts, parts[0]._replace(print=9)], "copies of expert 0 of w differ"),
    ],
)
def test_experts_that_ranks_do_not_hold_once(change: Callable[[list[Part]], list[Part]], words: str) -> None:
    parts = [Part("w", e, ((2 * half, 2 * half + 2), (0, 5)), 2**63 + e) for e in range(2) for half in range(2)]
    copies = [*parts, *parts]
    assert join(copies, {"w": (2, 4, 5)}) == {"w": [f"{0:016x}", f"{2:016x}"]}
    with pytest.raises(ValueError, match=words):
        join(change(parts), {"w": (2, 4, 5)})


def _made(folder: Path, seed: int, world: int = 1) -> tuple[Checkpointer, dict[str, Tensor]]:
    config = small_config(folder)
    model = build(config.model, seed)
    if world > 1:
        model = parallelize(GPT(config.model, device="meta"), build_mesh("cpu", ep=world))
        model.init_weights(seed)
    state = training_state(model, build_optimizer(model, OptimConfig()))
    return Checkpointer(folder, to_dict(config)["model"]), state


def _save(folder: Path) -> Path:
    checkpoints, state = _made(folder, 3)
    checkpoints.save(state, Progress(step=1))
    assert checkpoints.wait() is None
    return folder / "step_00000001"


def _rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Changes a checkpoint's one shard and seals it again: no file is damaged, its content is wrong."""
    file = next(path.glob("*.safetensors"))
    with safe_open(file, framework="pt") as shard:
        tensors, told = {name: shard.get_tensor(name) for name in shard.keys()}, shard.metadata()  # noqa: SIM118
    places = json.loads(told["DCP_SHARDING_INFO"])
    change(tensors, places)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, told | {"DCP_SHARDING_INFO": json.dumps(places)})
    manifest = read_manifest(path)
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
    manifest["seal"] = seal_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    verify(path)


def _swap(tensors: dict[str, Tensor], places: dict[str, Any]) -> None:
    tensors[STACK] = tensors[STACK][[0, 3, 2, 1]]


def _drop_last(tensors: dict[str, Tensor], places: dict[str, Any]) -> None:
    tensors[STACK] = tensors[STACK][:3]


def _drop_first(tensors: dict[str, Tensor], places: dict[str, Any]) -> None:
    tensors[STACK] = tensors[STACK][1:]
    places[STACK]["saved_offsets"] = [1, 0, 0, 0]


def _repeat(tensors: dict[str, Tensor], places: dict[str, Any]) -> None:
    tensors[STACK] = tensors[STACK][[0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swap, r"blocks\.2\.moe\.experts\.w_in\[1\] holds expert 3"),
        (_repeat, r"blocks\.2\.moe\.experts\.w_in\[2\] holds expert 0"),
        (_drop_last, r"w_in is \(3, 2, 20, 24\) there and \(4, 2, 20, 24\) here"),
        (_drop_first, r"lacks a part of model\.blocks\.2\.moe\.experts\.w_in: 2880 elements instead of 3840"),
    ],
)
def test_a_checkpoint_with_wrong_experts_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    path = _save(tmp_path)
    _rewrite(path, lambda tensors, places: None)
    checkpoints, state = _made(tmp_path, 4)
    checkpoints.load(path, state, {})
    _rewrite(path, change)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.load(path, state, {})


def test_prints_of_the_moments_too(tmp_path: Path) -> None:
    names = read_manifest(_save(tmp_path))["experts"]
    tensors = ("w_in", "w_out")
    kinds = ("optimizer", ".exp_avg"), ("optimizer", ".exp_avg_sq"), ("model", "")
    blocks = (1, 2)
    assert sorted(names) == sorted(
        f"{a}.blocks.{b}.moe.experts.{t}{z}" for a, z in kinds for b in blocks for t in tensors
    )
    assert [len(names[f"model.blocks.{b}.moe.experts.w_in"]) for b in blocks] == [2, 4]


def _misread(rank: int, world: int, folder: str, skip: bool) -> list[str]:
    """Rank 1 reads its experts' weights from where rank 0's are, or not at all."""
    checkpoints, state = _made(Path(folder), 4, world)
    path = Path(folder) / "step_00000001"
    checkpoints.load(path, state, {})
    everyone = checkpoints._agree(local_parts({STACK: state[STACK]}))
    prints = join([part for parts in everyone for part in parts], {STACK: (4, 2, 20, 24)})
    real = HuggingFaceStorageReader._process_read_request

    def wrong(self: Any, file: Any, request: Any, planner: Any) -> None:
        if rank == 1 and request.storage_index.fqn == STACK:
            if skip:
                return
            object.__setattr__(request, "storage_offsets", torch.Size([0, 0, 0, 0]))
        real(self, file, request, planner)

    HuggingFaceStorageReader._process_read_request = wrong
    fresh = _made(Path(folder), 5, world)[1]
    try:
        checkpoints.load(path, fresh, {})
    except CheckpointError as error:
        return [str(error), *prints[STACK]]
    return ["nothing was noticed"]


@pytest.mark.dist
@pytest.mark.parametrize(("skip", "words"), [(False, "holds expert 0"), (True, "holds none of the experts saved")])
def test_ranks_that_load_the_same_experts_are_told(skip: bool, words: str, tmp_path: Path) -> None:
    """DeepSpeed #6589: both of two ranks load the first half."""
    saved = read_manifest(_save(tmp_path))["experts"][STACK]
    for told, *prints in run_ranks(_misread, 2, str(tmp_path), skip):
        assert f"was not read as it was saved: {STACK}[2] {words}" in told
        assert prints == saved, "read rightly, two ranks hold what one has saved"
