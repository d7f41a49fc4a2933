"""Every preset is built on the meta device and counted; the paper's must have the paper's sizes."""

from dataclasses import replace

import pytest
import torch

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.params import count_params, flops_per_token
from coterie.models.presets import PRESETS
from coterie.moe.config import MoEConfig

# Published sizes in billions (DeepSpeed-MoE, tables 2, 4 and 5, to the digits recomputed from its formula).
PUBLISHED = {
    "gpt-350m": "0.356",
    "gpt-350m-moe-128": "13.15",
    "gpt-350m-pr-moe": "4.12",
    "gpt-350m-mos": "3.54",
    "gpt-1.3b": "1.316",
    "gpt-1.3b-moe-128": "52.47",
    "gpt-1.3b-pr-moe": "31.39",
    "gpt-1.3b-mos": "26.94",
    "gpt-6.7b": "6.658",
}
ACTIVATED = {
    "gpt-350m-moe-128": 0.357,
    "gpt-350m-pr-moe": 0.457,
    "gpt-1.3b-moe-128": 1.319,
    "gpt-1.3b-pr-moe": 1.720,
    "gpt-1.3b-mos": 1.502,
}


def _formula(config: ModelConfig) -> int:
    """The paper's count: biases everywhere but in the router, tied head, no final LayerNorm."""
    L, h, V, S = config.layers, config.dim, config.vocab_size, config.max_positions
    total = L * (12 * h * h + 13 * h) + V * h + S * h
    for E in config.experts:
        if E:
            extra = E if config.moe.residual else E - 1
            total += extra * (8 * h * h + 5 * h) + E * h
            total += 2 * h + 2 if config.moe.residual else 0
    return total


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_the_model(name: str) -> None:
    config = PRESETS[name]()
    model = GPT(config, device="meta")
    count = count_params(config)
    assert sum(p.numel() for p in model.parameters()) == count.total
    stacked = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert stacked == count.experts
    embedding = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("embed.", "positions.", "head.")))
    assert embedding == count.embedding


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gpt-")])
def test_paper_presets_follow_the_paper_formula(name: str) -> None:
    config = PRESETS[name]()
    final_norm = 2 * config.dim
    assert count_params(config).total == _formula(config) + final_norm
    if name in PUBLISHED:
        text = PUBLISHED[name]
        digits = len(text.partition(".")[2])
        assert f"{count_params(config).total / 1e9:.{digits}f}" == text
        assert f"{_formula(config) / 1e9:.{digits}f}" == text
    if name in ACTIVATED:
        assert count_params(config).activated / 1e9 == pytest.approx(ACTIVATED[name], abs=6e-4)


def test_pyramids() -> None:
    teacher, student = PRESETS["gpt-1.3b-pr-moe"](), PRESETS["gpt-1.3b-mos"]()
    assert [e for e in teacher.experts if e] == [64] * 10 + [128] * 2
    assert [e for e in student.experts if e] == [64] * 8 + [128] * 2
    assert teacher.experts[:4] == (0, 64, 0, 64)
    assert student.experts[-4:] == (128, 0, 128, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": "none", "tied_head": False, "attention_bias": "all", "mlp_bias": True},
        {"qk_norm": "all", "attention_bias": "qkv", "head_dim": 10},
        {"head_dim": 20, "positions": "learned", "norm": "layernorm", "activation": "gelu"},
        {"moe": MoEConfig(top_k=2, shared_hidden=24, shared_gate=True, bias=True)},
        {"moe": MoEConfig(top_k=3, residual=True, hidden=12, activation="gelu", bias=True)},
        {"moe": MoEConfig(top_k=2, shared_hidden=24, activation="gelu")},
    ],
)
def test_counts_of_every_option(change: dict) -> None:
    config = ModelConfig(
        vocab_size=50, layers=3, dim=48, heads=6, kv_heads=2, hidden=30, qk_norm="head", experts=(0, 4, 8)
    )
    config = replace(config, **change)
    model, count = GPT(config, device="meta"), count_params(config)
    assert sum(p.numel() for p in model.parameters()) == count.total
    idle = sum(
        p.numel() * (p.shape[0] - config.moe.top_k) // p.shape[0]
        for n, p in model.named_parameters()
        if ".experts." in n
    )
    assert count.activated == count.total - idle


def test_small_presets_activate_what_their_dense_twins_have() -> None:
    for dense, sparse in [
        ("tiny-dense", "tiny-pr-moe"),
        ("small-dense", "small-moe"),
        ("small-dense", "small-pr-moe"),
    ]:
        base, other = count_params(PRESETS[dense]()), count_params(PRESETS[sparse]())
        assert other.activated == pytest.approx(base.activated, rel=0.01)
        assert other.total > 1.5 * base.total


def test_flops_are_what_torch_counts() -> None:
    """Forward operations as torch counts them, which takes causal attention for a full square and skips norms."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config, S = replace(PRESETS["tiny-dense"](), layers=2), 64
    model = GPT(config, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, S, dtype=torch.long, device="meta"))
    other_half = 2 * config.layers * config.heads * config.width_per_head * S * S
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counter.get_total_flops() == (flops_per_token(config, S) // 3 - 2 * norms) * S + other_half


def test_flops_count_the_visited_experts_alone() -> None:
    dense, sparse = PRESETS["small-dense"](), PRESETS["small-moe"]()
    routers = 6 * 8 * 16 * 384
    assert flops_per_token(sparse, 100) - flops_per_token(dense, 100) == routers
