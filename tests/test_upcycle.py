"""Upcycling: the MoE says what the dense model said, for every option that promises it, and the others say so."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import Held, assert_close_rms, rms_ratio
from runs import build

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.upcycle import Upcycled, Upcycling, difference, experts_of_layers, upcycled_config
from coterie.moe.config import GateConfig

DENSE = ModelConfig(vocab_size=61, max_positions=64, layers=3, dim=24, heads=3, hidden=48, init_std=0.2)
# Qwen: grouped queries, heads of another width, norms of queries and keys. GPT-2: gelu, biases, learned positions.
QWEN = replace(DENSE, heads=4, kv_heads=2, head_dim=10, qk_norm="head", tied_head=False)
GPT2 = replace(DENSE, activation="gelu", norm="layernorm", positions="learned", attention_bias="all", mlp_bias=True)
BIASED = replace(DENSE, attention_bias="qkv", mlp_bias=True)
MODELS = {"swiglu": DENSE, "qwen": QWEN, "gpt2": GPT2, "swiglu with biases": BIASED}
NONE, SIGMOID = GateConfig(renormalize="none"), GateConfig(score="sigmoid")
HOWS = {
    "copies": Upcycling((4, 4, 4), 2),
    "slices of a half": Upcycling((8, 8, 8), 2, granularity=2),
    "slices of a quarter": Upcycling((16, 16, 16), 4, granularity=4),
    "two groups of halves": Upcycling((8, 8, 8), 4, granularity=2),
    "three groups of quarters": Upcycling((16, 16, 16), 12, granularity=4),
    "slices of a third": Upcycling((6, 6, 6), 3, granularity=3),
    "pyramid": Upcycling((0, 4, 8), 2, granularity=2),
    "weights of what is kept": Upcycling((8, 8, 8), 4, granularity=2, gate=GateConfig(renormalize="after_drop")),
    "sigmoid": Upcycling((8, 8, 8), 4, granularity=2, gate=SIGMOID),
    "route scale": Upcycling((8, 8, 8), 2, granularity=2, gate=replace(SIGMOID, route_scale=2.5)),
    "bias of the choice": Upcycling((8, 8, 8), 4, granularity=2, gate=GateConfig(bias_update=1e-3)),
    "gate groups": Upcycling((8, 8, 8), 2, granularity=2, gate=GateConfig(groups=2, topk_groups=1)),
    "all experts": Upcycling((4, 4, 4), 4, granularity=2, gate=NONE),
    "one of copies, router of zeros": Upcycling((4, 4, 4), 1, router_std=0.0),
    "raw weights, router of zeros": Upcycling((8, 4, 8), 4, granularity=2, router_std=0.0, gate=NONE),
    "raw sigmoid, router of zeros": Upcycling(
        (8, 8, 8), 4, granularity=4, router_std=0.0, gate=replace(SIGMOID, renormalize="none")
    ),
    "shared": Upcycling((6, 6, 6), 3, granularity=4, shared=1),
    "shared and gated": Upcycling((6, 6, 6), 4, granularity=4, shared=2, shared_gate=True),
    "shared, raw weights": Upcycling((6, 6, 6), 3, granularity=4, shared=1, router_std=0.0, gate=NONE),
    "residual": Upcycling((4, 0, 4), 2, residual=True),
    "residual of one": Upcycling((4, 4, 8), 1, residual=True, router_std=0.0),
    "residual and shared": Upcycling((4, 4, 4), 2, granularity=2, shared=1, residual=True),
}


def dense_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random ones: biases and norms too, which begin at 0 and 1."""
    tensors = build(config).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}


def load(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> GPT:
    model = GPT(config)
    model.load_state_dict(tensors)
    return model.eval()


def upcycled(config: ModelConfig, how: Upcycling) -> tuple[GPT, GPT, Upcycled]:
    tensors = dense_tensors(config)
    view = Upcycled(config, Held(tensors), how)
    return load(config, tensors), load(view.config, {n: view.read(n, ()) for n in view.names()}), view


def tokens(batch: int = 5, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("how", HOWS)
def test_the_function_is_kept(how: str, model: str) -> None:
    assert difference(HOWS[how]) == ""
    dense, moe, _ = upcycled(MODELS[model], HOWS[how])
    with torch.no_grad():
        expected, actual = dense(tokens()).logits_BSV, moe(tokens()).logits_BSV
    assert_close_rms(actual, expected, 1e-5, "logits")


@pytest.mark.parametrize("how", ["two groups of halves", "three groups of quarters", "shared"])
def test_choices_are_whole_groups(how: str) -> None:
    """Also of a router of zeros, where all scores tie."""
    chosen = HOWS[how]
    size = chosen.granularity - chosen.shared
    for std in (0.02, 0.0):
        _, moe, _ = upcycled(DENSE, replace(chosen, router_std=std))
        with torch.no_grad():
            routes = moe(tokens()).routes
        for choices_TK in routes:
            members = choices_TK.sort(1).values.unflatten(1, (-1, size))
            assert torch.equal(members % size, torch.arange(size).expand_as(members)), "every slice once"
            assert torch.equal(members // size, (members // size)[..., :1].expand_as(members)), "of one group"
        groups = {int(c) // size for choices_TK in routes for c in choices_TK.flatten()}
        assert (len(groups) > chosen.top_k // size) == (std > 0), "a router with rows uses more than one"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (Upcycling((4, 4, 4), 2, noise=0.1), "copies with noise of 0.1"),
        (Upcycling((8, 8, 8), 4, granularity=2, gate=NONE, router_std=0.2), "scaled for a router of zeros"),
        (Upcycling((4, 4, 4), 1, router_std=0.2), "scaled for a router of zeros"),
    ],
)
def test_what_does_not_keep_it_says_so(how: Upcycling, reason: str) -> None:
    assert reason in difference(how)
    dense, moe, _ = upcycled(DENSE, how)
    with torch.no_grad():
        assert 1e-4 < rms_ratio(moe(tokens()).logits_BSV, dense(tokens()).logits_BSV) < 1


def test_noise_makes_every_copy_another() -> None:
    _, _, view = upcycled(GPT2, Upcycling((4, 4, 4), 2, granularity=2, noise=0.1))
    for name in ("blocks.1.moe.experts.w_in", "blocks.1.moe.experts.w_out"):
        copies = view.read(name, ()).unflatten(0, (2, 2))
        assert 0.05 < rms_ratio(copies[0], copies[1]) < 0.3
    biases = view.read("blocks.1.moe.experts.b_out", ())
    assert torch.equal(biases[0], biases[2])


@pytest.mark.parametrize("how", ["pyramid", "shared and gated", "residual", "bias of the choice"])
def test_any_box_is_that_of_the_whole(how: str) -> None:
    """As a rank reads its experts, or its slice of every expert."""
    for noise in (0.0, 0.1):
        tensors = dense_tensors(BIASED)
        view = Upcycled(BIASED, Held(tensors), replace(HOWS[how], noise=noise))
        for name in view.names():
            whole = view.read(name, ())
            assert tuple(whole.shape) == view.shape(name)
            assert whole.dtype == view.dtype(name)
            cuts = [(slice(0, size), slice(size // 2, size), slice(size // 3, size // 2)) for size in whole.shape]
            for box in itertools.product(*cuts):
                assert torch.equal(view.read(name, box), whole[box]), name


def test_the_dense_tensors_stay_as_they_are() -> None:
    tensors = dense_tensors(BIASED)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    view = Upcycled(BIASED, Held(tensors), HOWS["three groups of quarters"])
    for name in view.names():
        view.read(name, ())
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_bf16_weights_keep_their_digits_where_the_scale_is_a_power_of_two() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in dense_tensors(DENSE).items()}
    for how in ("slices of a half", "slices of a quarter"):
        view = Upcycled(DENSE, Held(tensors), HOWS[how])
        found = {n: view.read(n, ()) for n in view.names()}
        assert {t.dtype for n, t in found.items() if ".gate." not in n} == {torch.bfloat16}
        assert found["blocks.0.moe.gate.weight"].dtype == torch.float32
        wide = Upcycled(DENSE, Held({n: t.float() for n, t in tensors.items()}), HOWS[how])
        assert all(torch.equal(found[n].float(), wide.read(n, ())) for n in found)


def test_the_same_seed_gives_the_same_router_and_another_one_another() -> None:
    views = (Upcycled(DENSE, Held(dense_tensors(DENSE)), replace(HOWS["copies"], seed=s)) for s in (1, 1, 2))
    one, two, other = (view.read("blocks.0.moe.gate.weight", ()) for view in views)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0.01 < one.std() < 0.03


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (Upcycling((0, 0, 0)), r"no layer would have experts"),
        (Upcycling((8, 8, 8), 5, granularity=5), r"dense width 48 does not divide into granularity 5"),
        (Upcycling((8, 8, 8), 0, granularity=0), r"granularity 0"),
        (Upcycling((8, 8, 8), 3, granularity=2), r"top_k=3 is no multiple of 2, .*: give 2"),
        (Upcycling((8, 8, 8), 1, granularity=4), r"top_k=1 is no multiple of 4, .*: give 4"),
        (Upcycling((8, 7, 8), 2, granularity=2), r"7 experts are no multiple of 2, .*: give 6"),
        (Upcycling((2, 2, 2), 4, granularity=2), r"top_k=4 is more than the layer's 2 experts"),
        (Upcycling((8, 8), 2), r"experts lists 2 layers, but the model has 3"),
        (Upcycling((8, 8, 8), 2, granularity=2, shared=2), r"shared must be 0 to 1 of the 2 slices"),
        (Upcycling((8, 8, 8), 2, granularity=2, residual=True), r"needs granularity 1"),
        (Upcycling((8, 8, 8), 2, shared_gate=True), r"shared_gate=True needs shared_hidden"),
        (Upcycling((8, 8, 8), 2, gate=GateConfig(capacity_factor=1.0)), r"upcycle dropless"),
        (Upcycling((8, 8, 8), 2, gate=GateConfig(eval_capacity_factor=1.0)), r"upcycle dropless"),
        (Upcycling((8, 8, 8), 2, granularity=2, gate=GateConfig(noise="gumbel")), r"sampled choices"),
        (Upcycling((8, 8, 8), 2, granularity=2, gate=GateConfig(groups=8, topk_groups=4)), r"would cut a set of 2"),
        (Upcycling((8, 8, 8), 2, noise=-1.0), r"cannot be negative"),
    ],
)
def test_what_does_not_fit_is_one_sentence(how: Upcycling, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        upcycled_config(DENSE, how)


def test_a_moe_is_not_upcycled() -> None:
    with pytest.raises(ValueError, match="has experts already"):
        upcycled_config(replace(DENSE, experts=(0, 0, 4)), HOWS["copies"])


def test_lists_of_layers() -> None:
    assert experts_of_layers("8", 4) == (8, 8, 8, 8)
    assert experts_of_layers("8", 5, every=2) == (0, 8, 0, 8, 0)
    assert experts_of_layers("8", 4, only=(0, 3)) == (8, 0, 0, 8)
    assert experts_of_layers("0,4,8x2", 4) == (0, 4, 8, 8)
    assert experts_of_layers("4,8", 4, every=2) == (0, 4, 0, 8)
    for text, options, sentence in (
        ("8", {"only": (4,)}, "there is no layer 4: the layers are 0 to 3"),
        ("8", {"only": (1,), "every": 2}, "not both"),
        ("4,8", {"only": (1,)}, "goes with one number of experts"),
        ("8", {"every": 0}, "at interval 0"),
        ("many", {}, "'many' is not a count"),
    ):
        with pytest.raises(ValueError, match=sentence):
            experts_of_layers(text, 4, **options)
