"""The training loss of a model that transformers made, and every gradient of it, are transformers' own."""

from pathlib import Path

import pytest
import torch
from helpers import Held, assert_close_rms
from hf_models import saved, tokens_for

from coterie.models.hf import FAMILIES
from coterie.models.parts import Outward
from coterie.models.weights import load_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_loss_and_gradients(tmp_path: Path, family: str, seed: int) -> None:
    theirs = saved(tmp_path, family, seed).train()
    ours = load_model(tmp_path).train()
    tokens_BS = tokens_for(theirs, batch=3, length=11)
    labels_BS = tokens_BS.masked_fill(torch.rand(tokens_BS.shape) < 0.2, -100)
    sparse = any(ours.config.experts)
    expected = theirs(tokens_BS, labels=labels_BS, output_router_logits=sparse)
    expected.loss.backward()

    targets_BS = torch.nn.functional.pad(labels_BS[:, 1:], (0, 1), value=-100)
    out = ours(tokens_BS, targets_BS=targets_BS)
    gate = ours.config.moe.gate
    assert (gate.aux_over, gate.aux_weight) == ("model", 0.0625)
    aux = out.aux / tokens_BS.numel()
    loss = out.lm / (targets_BS != -100).sum() + (gate.aux_weight * aux if sparse else 0)
    loss.backward()
    assert_close_rms(loss, expected.loss, 1e-6, "loss")
    if sparse:
        assert_close_rms(aux, expected.aux_loss, 1e-5, "router loss")
        # Without the router's part they would differ by more than the tolerance.
        assert gate.aux_weight * aux > 1e-3

    # Theirs are stacked: ours are put into the same places by the table that stacks.
    table = FAMILIES[family].table(ours.config, True)
    back = Outward(Held({name: p.grad for name, p in ours.named_parameters()}), table)
    parameters = dict(theirs.named_parameters())
    assert set(back.names()) == set(parameters)
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            assert_close_rms(back.read(name, ()), parameter.grad, 2e-5, name)
