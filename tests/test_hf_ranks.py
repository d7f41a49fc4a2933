"""Ranks read their own shards of a model that transformers made, and compute what one rank computes."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_close_rms
from hf_models import model_of
from ranks import run_ranks

from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.models.stored import StoredTensors
from coterie.models.weights import full_state_dict, load_model, load_weights, read_config
from coterie.parallel.mesh import build_mesh

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 38,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SIZES, head_dim=10, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": transformers.OlmoeConfig(**SIZES, **EXPERTS, attention_bias=True),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SIZES, **EXPERTS, moe_intermediate_size=14, shared_expert_intermediate_size=10
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, **EXPERTS, moe_intermediate_size=14, head_dim=8, mlp_only_layers=[0], tie_word_embeddings=True
    ),
    "llama": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "gpt2": transformers.GPT2Config(vocab_size=38, n_embd=24, n_head=4, n_layer=2, n_positions=64),
}


def _read(rank: int, world: int, folder: str, layout: dict[str, int]) -> dict[str, object]:
    """Logits, or nothing where the vocabulary is cut, the whole tensors, and how many numbers were read."""
    read = 0
    plain = StoredTensors.read

    def counted(self: StoredTensors, name: str, box: tuple[slice, ...]) -> torch.Tensor:
        nonlocal read
        found = plain(self, name, box)
        read += found.numel()
        return found

    StoredTensors.read = counted  # type: ignore[method-assign]
    model = parallelize(GPT(read_config(folder), device="meta"), build_mesh("cpu", **layout)).eval()
    load_weights(folder, model)
    tokens_BS = torch.arange(24).view(2, 12) % 38
    targets_BS = tokens_BS.roll(-1, 1)
    rows = slice(rank, rank + 1) if "ep" in layout else slice(None)
    with torch.no_grad():
        out = model(tokens_BS[rows], targets_BS=targets_BS[rows])
    torch.distributed.all_reduce(out.lm)
    state = full_state_dict(model)
    return {"lm": out.lm, "state": state, "read": read, "held": sum(p.numel() for p in state.values())}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, {"ep": 2}) for family in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")),
        *((family, {"tp": 2}) for family in ("llama", "gpt2", "mixtral", "olmoe")),
    ],
)
def test_each_rank_reads_its_shard(tmp_path: Path, family: str, layout: dict[str, int]) -> None:
    theirs = model_of(CONFIGS[family])
    theirs.save_pretrained(tmp_path)
    alone = load_model(tmp_path)
    tokens_BS = torch.arange(24).view(2, 12) % 38
    with torch.no_grad():
        expected = alone(tokens_BS, targets_BS=tokens_BS.roll(-1, 1)).lm
        assert_close_rms(alone(tokens_BS).logits_BSV, theirs(tokens_BS).logits, 1e-5, "logits of one rank")
    first, second = run_ranks(_read, 2, str(tmp_path), layout)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(first["state"][name], tensor), name
    assert_close_rms(first["lm"], expected, 1e-5, "loss")
    for one in (first, second):
        assert one["read"] < 0.75 * first["held"], "a rank read what another holds"
