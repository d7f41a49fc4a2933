"""The cache, the sampler and generation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close_rms
from torch import Tensor

from coterie.infer.cache import DenseCache
from coterie.infer.generate import generate, open_model, stream_text
from coterie.infer.sampler import sample
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.tokenizer import train_bpe
from coterie.models.weights import save_model
from coterie.moe.config import GateConfig, MoEConfig

MODERN = ModelConfig(
    vocab_size=300,
    max_positions=40,
    layers=3,
    dim=48,
    heads=6,
    kv_heads=2,
    hidden=28,
    qk_norm="head",
    init_std=0.3,
    tied_head=False,
    experts=(0, 4, 8),
    moe=MoEConfig(top_k=2, hidden=20, residual=True),
)
GPT2 = replace(
    MODERN,
    kv_heads=0,
    positions="learned",
    norm="layernorm",
    activation="gelu",
    attention_bias="all",
    mlp_bias=True,
    qk_norm="none",
    moe=MoEConfig(top_k=1, hidden=20, activation="gelu", bias=True, gate=GateConfig(capacity_factor=1.0)),
)


def _model(config: ModelConfig) -> GPT:
    model = GPT(config)
    model.init_weights(8)
    return model.eval()


@pytest.mark.parametrize("config", [MODERN, GPT2], ids=["modern", "gpt2"])
@pytest.mark.parametrize("pieces", [[7, 1, 1, 1, 1], [3, 4, 1, 3], [11]], ids=str)
def test_a_cached_pass_equals_a_whole_one(config: ModelConfig, pieces: list[int]) -> None:
    model, tokens_BS = _model(config), torch.randint(0, 300, (3, 11))
    expected_BSV = model(tokens_BS).logits_BSV
    cache = DenseCache(config, 3, 12)
    for part_BS in tokens_BS.split(pieces, 1):
        old = cache.length
        logits_BSV = model(part_BS, cache=cache).logits_BSV
        cache.advance(part_BS.shape[1])
        assert_close_rms(logits_BSV, expected_BSV[:, old : cache.length], 1e-5)


def test_a_full_cache_refuses() -> None:
    model, cache = _model(MODERN), DenseCache(MODERN, 1, 4)
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache made for 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("config", [MODERN, GPT2], ids=["modern", "gpt2"])
def test_greedy_equals_recomputing_everything(config: ModelConfig) -> None:
    model, tokens_BS = _model(config), torch.randint(0, 300, (3, 6))
    got_BS = torch.stack(list(generate(model, tokens_BS, 20, temperature=0)), 1)
    whole_BS = tokens_BS
    for _ in range(20):
        whole_BS = torch.cat([whole_BS, model(whole_BS).logits_BSV[:, -1:].argmax(-1)], 1)
    assert torch.equal(got_BS, whole_BS[:, 6:])
    assert len(set(got_BS.flatten().tolist())) > 10, "a model that repeats itself would show nothing"


def test_seeds_decide_and_nothing_global_moves() -> None:
    model, tokens_BS = _model(MODERN), torch.randint(0, 300, (2, 4))
    state = torch.get_rng_state()

    def run(seed: int) -> Tensor:
        return torch.stack(list(generate(model, tokens_BS, 12, temperature=2.0, seed=seed)))

    first = run(1)
    torch.rand(5)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    torch.set_rng_state(state)
    run(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_end_of_a_document_is_kept() -> None:
    model, tokens_BS = _model(MODERN), torch.randint(0, 300, (2, 4))
    free_BS = torch.stack(list(generate(model, tokens_BS, 12, temperature=0)), 1)
    eos = int(free_BS[0, 3])
    held_BS = torch.stack(list(generate(model, tokens_BS, 12, temperature=0, eos_id=eos)), 1)
    for free, held in zip(free_BS.tolist(), held_BS.tolist(), strict=True):
        end = free.index(eos) if eos in free else len(held)
        assert held[: end + 1] == free[: end + 1][: len(held)]
        assert all(token == eos for token in held[end:])
    one = list(generate(model, tokens_BS[:1], 12, temperature=0, eos_id=eos))
    assert len(one) == free_BS[0].tolist().index(eos) + 1


@pytest.mark.parametrize(
    ("tokens", "new", "settings", "words"),
    [
        ([[]], 4, {}, "prompt is empty"),
        ([[1] * 38], 4, {}, "38 prompt tokens and 4 new ones pass the model's 40 positions"),
        ([[1, 300]], 4, {}, "token id 300, outside the model's vocabulary of 300"),
        ([[1, -2]], 4, {}, "token id -2, outside"),
        ([[1]], 4, {"temperature": -1.0}, "temperature -1.0"),
        ([[1]], 4, {"temperature": float("inf")}, "temperature inf"),
        ([[1]], 4, {"top_p": 0.0}, "top_p 0.0"),
        ([1, 2], 4, {}, r"prompts of shape \[2\] are not \(batch, tokens\)"),
        ([[1]], 4, {"top_k": -1}, "top_k -1"),
        ([[1]], -1, {}, "max_new_tokens -1"),
    ],
)
def test_bad_requests_are_refused_before_any_work(tokens: list, new: int, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(_model(MODERN), torch.tensor(tokens, dtype=torch.long), new, **settings)


def _frequencies(logits_V: Tensor, draws: int = 40_000, **settings: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids_B = sample(logits_V.expand(draws, -1), generator=generator, **settings)  # type: ignore[arg-type]
    return torch.bincount(ids_B, minlength=len(logits_V)) / draws


def test_sampling_follows_the_distribution() -> None:
    probs_V = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    logits_V = probs_V.log() + 3.0
    assert (_frequencies(logits_V) - probs_V).abs().max() < 0.01
    hot_V = probs_V.sqrt() / probs_V.sqrt().sum()
    assert (_frequencies(logits_V, temperature=2.0) - hot_V).abs().max() < 0.01
    top2_V = torch.tensor([0, 0.4, 0, 0.3, 0]) / 0.7
    assert (_frequencies(logits_V, top_k=2) - top2_V).abs().max() < 0.01
    # 0.4 + 0.3 is under 0.75, so the third likeliest stays as well.
    top_p_V = torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85
    assert (_frequencies(logits_V, top_p=0.75) - top_p_V).abs().max() < 0.01
    # Of the three likeliest, renormalised, the first two already hold 0.82.
    assert (_frequencies(logits_V, top_k=3, top_p=0.8) - top2_V).abs().max() < 0.01
    assert (_frequencies(logits_V, top_k=99) - probs_V).abs().max() < 0.01
    assert _frequencies(logits_V, top_p=1e-6)[1] == 1


def test_greedy_takes_the_lowest_of_equals_and_needs_no_generator() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert sample(logits_BV, temperature=0).tolist() == [1, 0]
    assert sample(logits_BV, top_k=1).tolist() == [1, 0]
    with pytest.raises(ValueError, match="needs a generator"):
        sample(logits_BV)


def test_a_temperature_near_zero_is_greedy() -> None:
    """Divided by it, logits overflow."""
    logits_BV, generator = torch.tensor([[0.5, 2.0, -3.0], [9.0, 1.0, 3.0]]), torch.Generator()
    for temperature in (1e-4, 1e-7, 1e-40, 1e-300):
        assert sample(logits_BV, temperature, generator=generator).tolist() == [1, 0]


def test_no_draw_takes_what_was_cut_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """At both ends of the random numbers, whatever the sums round to."""
    logits_BV = torch.randn(64, 5000) * 3
    for u in (0.0, 1 - 2**-53):
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **_: torch.full(shape, u, dtype=torch.float64))
        for settings in ({"top_k": 7}, {"top_p": 0.3}, {"top_k": 50, "top_p": 0.9}, {}):
            ids_B = sample(logits_BV, generator=torch.Generator(), **settings)  # type: ignore[arg-type]
            ranks_B = (logits_BV > logits_BV.gather(1, ids_B[:, None])).sum(1)
            assert ids_B.max() < 5000
            if "top_k" in settings:
                assert ranks_B.max() < settings["top_k"]
            if "top_p" in settings:
                before_B = [
                    logits_BV[b].softmax(0)[logits_BV[b] > logits_BV[b, i]].sum() for b, i in enumerate(ids_B)
                ]
                assert max(before_B) < settings["top_p"] + 1e-5
    dead_BV = torch.full((1, 9), float("-inf"))
    dead_BV[0, 4] = 0.0
    assert sample(dead_BV, generator=torch.Generator()).tolist() == [4]


def test_damaged_weights_are_told() -> None:
    model = _model(MODERN)
    with torch.no_grad():
        model.final_norm.weight[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits are not finite"):
            next(generate(model, torch.tensor([[1, 2]]), 4, temperature=temperature))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "run" / "model", _model(MODERN), train_bpe(["hello world, hello text"] * 3, 290))
    return tmp_path / "run"


def test_models_open_by_their_directory_or_their_run(folder: Path) -> None:
    for path in (folder, folder / "model"):
        model, tokenizer = open_model(path, device="cpu")
        assert model.config == MODERN
        assert not model.training
        assert tokenizer is not None
    pieces = list(stream_text(folder, "hello", 10, device="cpu", temperature=0))
    again = list(stream_text(folder / "model", "hello", 10, device="cpu", temperature=0))
    assert "".join(pieces) == "".join(again)
    assert "".join(stream_text(folder, "", 5, device="cpu", seed=1)) is not None
    save_model(folder / "model", open_model(folder, device="cpu")[0], file_bytes=20_000)
    assert not (folder / "model" / "model.safetensors").exists()
    for path in (folder, folder / "model"):
        assert "".join(stream_text(path, "hello", 10, device="cpu", temperature=0)) == "".join(pieces)


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_told(folder: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device '?{device}"):
        open_model(folder, device=device)


def test_a_prompt_that_is_no_text_is_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="the prompt is not UTF-8"):
        list(stream_text(folder, "caf\udce9", device="cpu"))


def test_what_is_no_model_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        open_model(tmp_path)
    (folder / "model" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        list(stream_text(folder, "hello", device="cpu"))
    (folder / "model" / "model.safetensors").unlink()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="has not written its model/ yet"):
        open_model(folder)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [MODERN, GPT2], ids=["modern", "gpt2"])
def test_greedy_on_cuda_equals_recomputing_everything(config: ModelConfig) -> None:
    model, whole_BS = _model(config).cuda(), torch.randint(0, 300, (3, 6)).cuda()
    got_BS = torch.stack(list(generate(model, whole_BS, 20, temperature=0)), 1)
    for _ in range(20):
        whole_BS = torch.cat([whole_BS, model(whole_BS).logits_BSV[:, -1:].argmax(-1)], 1)
    assert torch.equal(got_BS, whole_BS[:, 6:])
