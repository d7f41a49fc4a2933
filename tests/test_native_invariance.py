"""A token's logits have the same bits whatever else is in the batch, for models of every option."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coterie.kernels import native
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.moe.config import GateConfig, MoEConfig

MOE = MoEConfig(top_k=2, hidden=44)
CONFIG = ModelConfig(
    vocab_size=67, max_positions=256, layers=3, dim=36, heads=6, kv_heads=2, hidden=52, experts=(6, 0, 9), moe=MOE
)
GROUPS = GateConfig(score="sigmoid", bias_update=1e-3, groups=3, topk_groups=2)
OPTIONS = {
    "mixtral": CONFIG,
    "gpt-2": replace(CONFIG, norm="layernorm", positions="learned", attention_bias="all", mlp_bias=True),
    "olmoe": replace(CONFIG, qk_norm="all"),
    "qwen3": replace(CONFIG, qk_norm="head"),
    "deepseek": replace(CONFIG, moe=replace(MOE, gate=GROUPS, shared_hidden=20)),
    "qwen2": replace(CONFIG, moe=replace(MOE, shared_hidden=20, shared_gate=True)),
    "pr-moe": replace(CONFIG, moe=replace(MOE, residual=True, activation="gelu", bias=True)),
}


class First:
    """Attention as the first token of a sequence has it: to itself alone, so that every token stands for itself."""

    losses, length = False, 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    if native.library() is None:
        pytest.skip(str(native.why_not()))
    before = torch.get_num_threads()
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_in_any_company(option: str, dtype: torch.dtype) -> None:
    model = GPT(OPTIONS[option], dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    tokens, at = torch.randint(0, 67, (1, 150)), torch.randint(0, 256, (1, 150))
    whole = model(tokens, at, cache=First()).logits_BSV
    for threads, count in ((1, 1), (2, 1), (2, 2), (3, 5), (1, 9), (2, 33), (2, 64), (1, 150)):
        torch.set_num_threads(threads)
        for first in {0, (150 - count) // 2, 150 - count}:
            part = slice(first, first + count)
            own = model(tokens[:, part].contiguous(), at[:, part].contiguous(), cache=First()).logits_BSV
            assert torch.equal(own, whole[:, part]), (threads, count, first)
