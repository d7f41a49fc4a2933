"""DeepSpeed-MoE checkpoints, written here file by file as Megatron-DeepSpeed does, are read as the same model."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.models.config import ModelConfig
from coterie.models.deepspeed import open_deepspeed
from coterie.models.deepspeed_config import Hints
from coterie.models.gpt import GPT
from coterie.models.parts import pieces
from coterie.moe.config import GateConfig, MoEConfig

CONFIG = ModelConfig(
    vocab_size=32,
    max_positions=16,
    layers=4,
    dim=24,
    heads=4,
    hidden=40,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    attention_bias="all",
    mlp_bias=True,
    experts=(0, 4, 0, 2),
    moe=MoEConfig(top_k=1, hidden=40, activation="gelu", bias=True, gate=GateConfig(renormalize="none")),
)
TOP2 = replace(CONFIG, moe=replace(CONFIG.moe, top_k=2, gate=GateConfig(renormalize="after_drop")))
MODELS = {
    "top1": CONFIG,
    "top2": TOP2,
    "residual": replace(CONFIG, moe=replace(CONFIG.moe, residual=True)),
    "swiglu": replace(
        TOP2,
        norm="rmsnorm",
        positions="rotary",
        activation="swiglu",
        attention_bias="none",
        mlp_bias=False,
        tied_head=False,
        kv_heads=2,
        moe=replace(TOP2.moe, activation="swiglu", bias=False, residual=True),
    ),
    "dense": replace(CONFIG, experts=(), moe=MoEConfig()),
    "sparse": replace(TOP2, experts=(4, 4, 2, 2)),
}


def _model(config: ModelConfig) -> GPT:
    torch.manual_seed(3)
    model = GPT(config)
    model.init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, and norms that are not all ones
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _args(config: ModelConfig) -> argparse.Namespace:
    return argparse.Namespace(
        num_attention_heads=config.heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        use_rotary_position_embeddings=config.positions == "rotary",
        rotary_percent=1.0,
        layernorm_epsilon=config.norm_eps,
        topk=config.moe.top_k,
        bias_gelu_fusion=config.activation == "gelu",
        moe_token_dropping=True,
        moe_train_capacity_factor=1.25,
        params_dtype=torch.float32,
        lr=1e-4,
    )


def _qkv(q: Tensor, kv: Tensor, order: str) -> Tensor:
    """Rows of one rank's query_key_value from (H, d, ...) and (2, G, d, ...)."""
    rows = []
    if order == "grouped":
        share = len(q) // kv.shape[1]
        for g in range(kv.shape[1]):
            rows += [*q[g * share : (g + 1) * share], kv[0, g], kv[1, g]]
        return torch.cat(rows)
    if order == "last":
        for h in range(len(q)):
            for i in range(q.shape[1]):
                rows += [q[h, i], kv[0, h, i], kv[1, h, i]]
        return torch.stack(rows)
    return torch.cat([*q, *kv[0], *kv[1]])


def _mlp(
    state: dict[str, Tensor], ours: str, theirs: str, rank: int, tp: int, at: int | None = None
) -> dict[str, Tensor]:
    """One feed-forward layer, or expert `at` of a stack, as rank `rank` of `tp` holds it."""
    found = {}
    for kind, name in {"w_in": "dense_h_to_4h.weight", "b_in": "dense_h_to_4h.bias"}.items():
        if f"{ours}.{kind}" in state:
            whole = state[f"{ours}.{kind}"] if at is None else state[f"{ours}.{kind}"][at]
            found[f"{theirs}.{name}"] = torch.cat([part.chunk(tp)[rank] for part in whole])
    whole = state[f"{ours}.w_out"] if at is None else state[f"{ours}.w_out"][at]
    found[f"{theirs}.dense_4h_to_h.weight"] = whole.chunk(tp, 1)[rank]
    if f"{ours}.b_out" in state:
        whole = state[f"{ours}.b_out"] if at is None else state[f"{ours}.b_out"][at]
        found[f"{theirs}.dense_4h_to_h.bias"] = whole
    return found


def _layer(state: dict[str, Tensor], n: int, rank: int, tp: int, cut: bool, order: str) -> dict[str, Tensor]:
    ours, theirs, found = f"blocks.{n}", f"layers.{n}", {}
    for one, other in {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}.items():
        found |= {f"{theirs}.{other}.{k}": state[f"{ours}.{one}.{k}"] for k in _kinds(state, f"{ours}.{one}")}
    for kind in _kinds(state, f"{ours}.attention.q"):
        q, kv = (
            state[f"{ours}.attention.q.{kind}"].chunk(tp)[rank],
            state[f"{ours}.attention.kv.{kind}"].chunk(tp, 1)[rank],
        )
        found[f"{theirs}.self_attention.query_key_value.{kind}"] = _qkv(q, kv, order)
    found[f"{theirs}.self_attention.dense.weight"] = state[f"{ours}.attention.out.weight"].chunk(tp, 1)[rank]
    if f"{ours}.attention.out_bias" in state:
        found[f"{theirs}.self_attention.dense.bias"] = state[f"{ours}.attention.out_bias"]
    if f"{ours}.moe.gate.weight" not in state:
        return found | _mlp(state, f"{ours}.mlp", f"{theirs}.mlp", rank, tp)
    found[f"{theirs}.mlp.deepspeed_moe.gate.wg.weight"] = state[f"{ours}.moe.gate.weight"]
    if f"{ours}.moe.coefficient.weight" in state:
        own = (rank, tp) if cut else (0, 1)
        found |= _mlp(state, f"{ours}.moe.residual", f"{theirs}.mlp.mlp", *own)
        found |= {f"{theirs}.mlp.coefficient.{k}": state[f"{ours}.moe.coefficient.{k}"] for k in ("weight", "bias")}
    return found


def _kinds(state: dict[str, Tensor], name: str) -> list[str]:
    return [kind for kind in ("weight", "bias") if f"{name}.{kind}" in state]


def write(
    folder: Path,
    model: GPT,
    tp: int = 1,
    cut: bool = False,
    order: str = "grouped",
    change: Callable[[dict[str, Any]], Any] = lambda data: None,
    **extra: Any,
) -> Path:
    """A checkpoint folder of a model: `cut` says whether experts are cut between the tensor-parallel ranks."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for rank in range(tp):
        embedding = {"word_embeddings": {"weight": state["embed.weight"].chunk(tp)[rank].clone()}}
        if "positions.weight" in state:
            embedding["position_embeddings"] = {"weight": state["positions.weight"]}
        encoder = {f"final_layernorm.{k}": state[f"final_norm.{k}"] for k in _kinds(state, "final_norm")}
        for n in range(model.config.layers):
            encoder |= _layer(state, n, rank, tp, cut, order)
        language_model: dict[str, Any] = {"embedding": embedding, "encoder": encoder}
        if "head.weight" in state:
            language_model["output_layer"] = {"weight": state["head.weight"].chunk(tp)[rank].clone()}
        data = {"module": {"language_model": language_model}, "checkpoint_version": 3.0, "args": _args(model.config)}
        data |= {"iteration": 7, "ds_version": "0.9", "rng_state": [{"random": (3, (1, 2), None)}], **extra}
        change(data)
        torch.save(data, step / f"mp_rank_{rank:02}_model_states.pt")
        moe_layer = 0
        for n, experts in enumerate(model.config.experts):
            for e in range(experts):
                name = f"language_model.encoder.layers.{n}.mlp.deepspeed_moe.experts.deepspeed_experts.{e}"
                own = (rank, tp) if cut else (0, 1)
                weights = {k: v.clone() for k, v in _mlp(state, f"blocks.{n}.moe.experts", name, *own, at=e).items()}
                torch.save(weights, step / f"layer_{moe_layer}_expert_{e}_mp_rank_{rank:02}_model_states.pt")
            moe_layer += experts > 0
        (step / f"expp_rank_{rank}_mp_rank_{rank:02}_optim_states.pt").write_bytes(b"not read")
    return folder


def _opened(folder: Path, hints: Hints | None = None) -> GPT:
    config, source = open_deepspeed(folder, hints)
    model = GPT(config)
    model.load_state_dict({name: source.read(name, ()) for name in source.names()})
    return model.eval()


def _same(one: GPT, other: GPT) -> None:
    tokens_BS = torch.randint(0, one.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(5))
    assert torch.equal(one(tokens_BS).logits_BSV, other(tokens_BS).logits_BSV)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("tp", "cut"), [(1, False), (2, False), (2, True)])
def test_a_checkpoint_is_the_model_it_was(tmp_path: Path, name: str, tp: int, cut: bool) -> None:
    model = _model(MODELS[name])
    opened = _opened(write(tmp_path, model, tp, cut))
    assert opened.config.experts == model.config.experts
    assert opened.config.moe.top_k == model.config.moe.top_k or not model.config.experts
    for key, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor), key
    _same(opened, model)


@pytest.mark.parametrize(
    ("order", "extra"),
    [
        ("split", {"checkpoint_version": 0}),
        ("last", {"checkpoint_version": 1.0}),
        ("grouped", {"checkpoint_version": 2.0}),
        ("split", {"args": argparse.Namespace(ds_sequence_parallel_fpdt=False, **vars(_args(CONFIG)))}),
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_queries_keys_and_values_of_every_age(tmp_path: Path, order: str, extra: dict[str, Any], tp: int) -> None:
    model = _model(CONFIG)
    _same(_opened(write(tmp_path, model, tp, order=order, **extra)), model)


def test_hints_stand_in_for_arguments(tmp_path: Path) -> None:
    model = _model(TOP2)
    write(tmp_path, model, order="split", args=None)
    with pytest.raises(ValueError, match=r"how many attention heads it has: give heads; .*visits: give top_k"):
        open_deepspeed(tmp_path)
    _same(_opened(tmp_path, Hints(heads=4, top_k=2, qkv="split")), model)


def test_boxes_and_pieces_are_parts_of_the_whole(tmp_path: Path) -> None:
    _, source = open_deepspeed(write(tmp_path, _model(MODELS["swiglu"]), 2, True))
    for name in source.names():
        whole = source.read(name, ())
        assert tuple(whole.shape) == source.shape(name)
        assert whole.dtype == source.dtype(name)
        assert torch.equal(torch.cat(list(pieces(source, name, 64))), whole)
        box = tuple(slice(size // 3, size // 3 + (size + 1) // 2) for size in whole.shape)
        assert torch.equal(source.read(name, box), whole[box])


def test_older_names_and_flat_ones_are_known(tmp_path: Path) -> None:
    def older(data: dict[str, Any]) -> None:
        model = data["module"]["language_model"]
        encoder = model.pop("encoder")
        model["transformer"] = {k.replace(".self_attention.", ".attention."): v for k, v in encoder.items()}

    def flat(data: dict[str, Any]) -> None:
        model = data["module"].pop("language_model")
        data["module"]["language_model.embedding.word_embeddings.weight"] = model["embedding"]["word_embeddings"][
            "weight"
        ]
        data["module"]["language_model.embedding.position_embeddings"] = model["embedding"]["position_embeddings"]
        data["module"] |= {f"language_model.encoder.{k}": v for k, v in model["encoder"].items()}
        stale = "encoderlayers.1.mlp.deepspeed_moe.experts.deepspeed_experts.0.dense_h_to_4h.weight"
        data["module"][stale] = torch.zeros(3)

    for name, change in {"older": older, "flat": flat}.items():
        _same(_opened(write(tmp_path / name, _model(CONFIG), change=change)), _model(CONFIG))


class _Payload:
    """What an attacker pickles: a call, made when the file is read without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["COTERIE_TEST_TRAP"],)


@pytest.mark.parametrize("file", ["mp_rank_00", "layer_1_expert_0_mp_rank_00"])
def test_a_pickle_that_asks_for_code_is_refused(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("COTERIE_TEST_TRAP", str(trap))
    write(tmp_path, _model(CONFIG))
    path = tmp_path / "global_step7" / f"{file}_model_states.pt"
    torch.save({"module": {}, "evil": _Payload()}, path)
    with pytest.raises(ValueError, match=r"read safely: it asks for '(posix|nt|os)\.mkdir'") as caught:
        open_deepspeed(tmp_path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # so the trap was one


def test_bystanders_of_megatron_and_numpy_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real checkpoints hold enums and the state of NumPy's generator; their classes are not even looked up."""
    import sys
    import types

    import numpy

    module = types.ModuleType("megatron.core.enums")

    class ModelType:
        def __setstate__(self, state: object) -> None:
            raise AssertionError("their code ran")

        def __getstate__(self) -> object:
            return {"value": 1}

    ModelType.__module__, ModelType.__qualname__ = "megatron.core.enums", "ModelType"
    module.ModelType = ModelType  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)
    model = _model(CONFIG)
    args = argparse.Namespace(model_type=ModelType(), **vars(_args(CONFIG)))
    write(tmp_path, model, args=args, rng_state=[{"np": numpy.random.get_state()}])
    monkeypatch.delitem(sys.modules, "megatron.core.enums")
    _same(_opened(tmp_path), model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda args: args.__setattr__("apply_layernorm_1p", True), "norms with a weight of 1"),
        (lambda args: args.__setattr__("squared_relu", True), "squared ReLU"),
        (lambda args: args.__setattr__("bias_gelu_fusion", False), "exact gelu"),
        (lambda args: args.__setattr__("rotary_percent", 0.25), "rotates a part"),
        (lambda args: args.__setattr__("num_attention_heads", 5), "do not split into 5 heads"),
        (lambda args: args.__setattr__("num_attention_heads", "4"), "num_attention_heads is '4', expected int"),
        (lambda args: args.__setattr__("topk", 3), "top_k=3 is more than"),
    ],
)
def test_arguments_that_coterie_cannot_follow_are_named(
    tmp_path: Path, change: Callable[[argparse.Namespace], None], words: str
) -> None:
    write(tmp_path, _model(CONFIG), change=lambda data: change(data["args"]))
    with pytest.raises(ValueError, match=words):
        open_deepspeed(tmp_path)


def _encoder(data: dict[str, Any]) -> dict[str, Tensor]:
    return data["module"]["language_model"]["encoder"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: _encoder(d).pop("final_layernorm.bias"), r"encoder\.final_layernorm\.bias is missing"),
        (lambda d: _encoder(d).update(stranger=torch.zeros(3)), r"encoder\.stranger is unknown"),
        (lambda d: _encoder(d).update({"layers.9.input_layernorm.weight": torch.zeros(24)}), "do not count from 0"),
        (
            lambda d: _encoder(d).update({"layers.0.self_attention.dense.weight": torch.zeros(3, 3)}),
            r"has shape \[3, 3\]",
        ),
        (lambda d: _encoder(d).update({"final_layernorm.bias": torch.zeros(24).long()}), "which is no weight's type"),
        (lambda d: _encoder(d).update({"final_layernorm.bias": torch.zeros(1).expand(24)}), "every number is stored"),
        (lambda d: d.update(module=3), "holds no model"),
        (lambda d: d["module"]["language_model"].pop("embedding"), "it is no GPT of Megatron"),
        (lambda d: d.update(checkpoint_version="x"), "expected a number"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    write(tmp_path, _model(CONFIG), change=change)
    with pytest.raises(ValueError, match=words):
        open_deepspeed(tmp_path)


def test_files_that_do_not_belong_are_named(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            open_deepspeed(tmp_path)
        assert "\n" not in str(caught.value)

    step = write(tmp_path, _model(CONFIG), 2) / "global_step7"
    expert = step / "layer_1_expert_1_mp_rank_01_model_states.pt"
    raw = expert.read_bytes()
    expert.unlink()
    refused("do not both have")
    for size in (0, 10, len(raw) // 2, len(raw) - 30):
        expert.write_bytes(raw[:size])
        refused("read safely")
    expert.unlink()
    os.mkfifo(expert)
    refused("no regular file")
    expert.unlink()
    with zipfile.ZipFile(expert, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
    refused("is compressed")
    expert.write_bytes(raw)
    open_deepspeed(tmp_path)
    (step / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    refused("ZeRO stage 3")
    (tmp_path / "latest").write_text("../../etc")
    refused("expected the name of a folder")
    (tmp_path / "latest").write_text("global_step9")
    refused("no such folder")


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = _model(CONFIG)
    with torch.no_grad():
        model.moe_layers[0].experts.w_in[1, 0, 2, 3] = torch.nan
    _, source = open_deepspeed(write(tmp_path, model))
    with pytest.raises(ValueError, match=r"blocks\.1\.moe\.experts\.w_in holds a NaN"):
        source.read("blocks.1.moe.experts.w_in", ())
