"""Models of every option give the same logits with the native kernels and without, and the kernels really run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_close_rms

from coterie.infer.paged import KVPool, PagedCache
from coterie.infer.step import Slice
from coterie.kernels import native
from coterie.models.config import ModelConfig, RopeScaling
from coterie.models.gpt import GPT
from coterie.moe.config import GateConfig, MoEConfig

MOE = MoEConfig(top_k=2, hidden=28)
CONFIG = ModelConfig(
    vocab_size=43,
    max_positions=64,
    layers=3,
    dim=30,
    heads=6,
    kv_heads=2,
    head_dim=10,
    hidden=28,
    tied_head=False,
    experts=(5, 0, 7),
    moe=MOE,
)
GROUPS = GateConfig(score="sigmoid", bias_update=1e-3, groups=2, topk_groups=1, route_scale=2.5)
OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "gpt-2": {
        "norm": "layernorm",
        "positions": "learned",
        "attention_bias": "all",
        "mlp_bias": True,
        "tied_head": True,
    },
    "olmoe": {"qk_norm": "all", "moe": replace(MOE, gate=GateConfig(renormalize="none"))},
    "qwen3": {"qk_norm": "head", "attention_bias": "qkv"},
    "deepseek": {"experts": (6, 0, 8), "moe": replace(MOE, gate=GROUPS, shared_hidden=20, shared_gate=True)},
    "pr-moe": {"moe": replace(MOE, residual=True, activation="gelu", bias=True)},
    "llama 3": {"rope_scaling": RopeScaling("llama3", 4.0, original_max_positions=16)},
    "linear": {"rope_scaling": RopeScaling("linear", 2.0)},
    "capacity": {"moe": replace(MOE, gate=GateConfig(eval_capacity_factor=1.0))},
}


@pytest.fixture
def model(request: pytest.FixtureRequest) -> GPT:
    if native.library() is None:
        pytest.skip(str(native.why_not()))
    made = GPT(replace(CONFIG, **OPTIONS[request.param])).eval()
    made.init_weights(3)
    with torch.no_grad():
        for parameter in made.parameters():  # norms and biases too: ones and zeros hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


@pytest.mark.parametrize("model", OPTIONS, indirect=True)
@pytest.mark.parametrize("cached", [False, True])
@torch.inference_mode()
def test_same_logits_with_and_without(model: GPT, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, 43, (3, 17))

    def logits() -> torch.Tensor:
        if not cached:
            return model(tokens).logits_BSV
        cache, parts = PagedCache(KVPool(model.config, 9, 8)), []
        for start, end in ((0, 9), (9, 10), (10, 17)):
            slices = [
                Slice((str(n), 0), start, tuple(row[start:end]), (3 * n, 3 * n + 2, 3 * n + 1), True)
                for n, row in enumerate(tokens.tolist())
            ]
            parts.append(model(*cache.begin(slices), cache=cache).logits_BSV.view(3, end - start, -1))
        return torch.cat(parts, 1)

    called: list[int] = []
    with native.hear(lambda entry, args: called.append(1)):
        got = logits()
    assert len(called) > 20
    monkeypatch.setattr(native, "ready", lambda *tensors: False)
    with native.hear(lambda entry, args: called.append(1)):
        before = len(called)
        want = logits()
    assert len(called) == before
    assert_close_rms(got, want, 1e-5)


@pytest.mark.parametrize("model", ["mixtral"], indirect=True)
def test_training_and_plain_evaluation_do_not_use_them(model: GPT) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a native kernel ran")

    tokens = torch.randint(0, 43, (2, 8))
    with native.hear(refuse):
        model(tokens, targets_BS=tokens).lm.backward()
        with torch.no_grad():
            model(tokens)
