"""The planner's bytes against the meta device, the real sharding, and what autograd keeps."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from plans import DENSE, TINY, really_sharded
from torch.autograd.graph import saved_tensors_hooks

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT, Recompute
from coterie.models.params import count_params
from coterie.models.presets import PRESETS
from coterie.parallel.layout import Layout
from coterie.train.plan_memory import Run, activations, memory, saved_by_layer, saved_outside
from coterie.train.plan_shards import local_sizes, weights


def _all_weights(config: ModelConfig) -> list[tuple[int | None, tuple[int, ...]]]:
    return [(layer, weight.shape) for layer in [*range(config.layers), None] for weight in weights(config, layer)]


@pytest.mark.parametrize("config", [*TINY.values(), *(p() for p in PRESETS.values())], ids=[*TINY, *PRESETS])
def test_the_inventory_is_the_model(config: ModelConfig) -> None:
    """Layer by layer, the elements of the model on the meta device."""
    expected: Counter[int | None] = Counter()
    for name, parameter in GPT(config, device="meta").named_parameters():
        expected[int(name.split(".")[1]) if name.startswith("blocks.") else None] += parameter.numel()
    found: Counter[int | None] = Counter()
    for layer, shape in _all_weights(config):
        found[layer] += math.prod(shape)
    assert found == expected
    assert found.total() == count_params(config).total


def test_a_shard_in_numbers() -> None:
    """q (4, 8, 32) over tp 2, then over 2 ranks; the experts' w_in (8, 2, 48, 32) over ep 4 and etp 2."""
    assert local_sizes((4, 8, 32), {0: 2}, 2) == (2 * 8 * 32, 2 * 8 * 16)
    assert local_sizes((8, 2, 48, 32), {0: 4, 2: 2}, 4) == (2 * 2 * 24 * 32, 2 * 2 * 24 * 8)
    assert local_sizes((50257, 30), {0: 2}, 4) == (25129 * 30, 6283 * 30), "nothing divides: dimension 0, rounded up"


LAYOUTS = [
    Layout(1, 1),
    Layout(1, 4, ep=4),
    Layout(2, 4, ep=2),
    Layout(1, 2, tp=2, ep=4),
    Layout(2, 2, tp=2, ep=8),
    Layout(1, 4, tp=2, ep=2, etp=2),
    Layout(4, 1, tp=2, ep=4, etp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_the_real_sharding_is_the_planned_one(config: ModelConfig, layout: Layout) -> None:
    """`parallelize` itself: to the element, but for small vectors whose shards are rounded up."""
    if not config.experts:
        layout = replace(layout, ep=1, etp=1)
    needed = memory(config, layout, Run(32, 1, 1, 2))
    assert 4 * really_sharded(config, layout) == pytest.approx(needed.parameters, rel=0.002)
    assert needed.optimizer == 2 * needed.parameters


def _saved(config: ModelConfig, tokens_BS: torch.Tensor, dtype: torch.dtype, recompute: Recompute) -> int:
    """Bytes of all storages that autograd keeps of one forward pass on this machine, but for the parameters'."""
    torch.manual_seed(0)
    model = GPT(config).train()
    model.init_weights(0)
    model = model.to(dtype)
    model.recompute = recompute
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(tokens_BS, targets_BS=tokens_BS)
        out.lm + out.aux + out.z
    return sum(storage.nbytes() for storage in kept.values())


def _left(config: ModelConfig, run: Run, layout: Layout | None = None) -> int:
    """Predicted: of all blocks, and outside."""
    layout = layout or Layout()
    return saved_outside(config, layout, run) + sum(
        activations(config, layout, run, layer)[0] for layer in range(config.layers)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_saved_bytes_are_the_predicted_ones(config: ModelConfig, dtype: torch.dtype) -> None:
    for batch, sequence in [(2, 64), (3, 32)]:
        tokens_BS = torch.randint(0, config.vocab_size, (batch, sequence))
        run = Run(sequence, batch, 1, dtype.itemsize, cpu=True)
        for recompute in ("none", "selective", "full"):
            predicted = _left(config, run._replace(recompute=recompute))
            assert _saved(config, tokens_BS, dtype, recompute) == pytest.approx(predicted, rel=0.1)


def test_tensor_parallelism_cuts_all_but_what_it_gathers() -> None:
    """Of a dense block only the gathered inputs of attention and MLP stay whole."""
    run = Run(64, 2, 1, 2)
    kept = [sum(saved_by_layer(DENSE, Layout(tp=tp), 0, run)) for tp in (1, 2)]
    gathered = 2 * run.tokens * DENSE.dim * run.work
    assert kept[1] - gathered == pytest.approx((kept[0] - gathered) / 2, abs=2)
