"""DeepSpeed-MoE checkpoints, written here file by file as Megatron-DeepSpeed does, are read as the same model."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_files import CONFIG, MODELS, TOP2, arguments, small_model, write
from torch import Tensor

from coterie.models.deepspeed import open_deepspeed
from coterie.models.deepspeed_config import Hints
from coterie.models.gpt import GPT
from coterie.models.parts import pieces


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
    model = small_model(MODELS[name])
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
        ("split", {"args": argparse.Namespace(ds_sequence_parallel_fpdt=False, **vars(arguments(CONFIG)))}),
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_queries_keys_and_values_of_every_age(tmp_path: Path, order: str, extra: dict[str, Any], tp: int) -> None:
    model = small_model(CONFIG)
    _same(_opened(write(tmp_path, model, tp, order=order, **extra)), model)


def test_hints_stand_in_for_arguments(tmp_path: Path) -> None:
    model = small_model(TOP2)
    write(tmp_path, model, order="split", args=None)
    with pytest.raises(ValueError, match=r"how many attention heads it has: give heads; .*visits: give top_k"):
        open_deepspeed(tmp_path)
    _same(_opened(tmp_path, Hints(heads=4, top_k=2, qkv="split")), model)


def test_boxes_and_pieces_are_parts_of_the_whole(tmp_path: Path) -> None:
    _, source = open_deepspeed(write(tmp_path, small_model(MODELS["swiglu"]), 2, True))
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
        _same(_opened(write(tmp_path / name, small_model(CONFIG), change=change)), small_model(CONFIG))


class _Payload:
    """What an attacker pickles: a call, made when the file is read without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["COTERIE_TEST_TRAP"],)


@pytest.mark.parametrize("file", ["mp_rank_00", "layer_1_expert_0_mp_rank_00"])
def test_a_pickle_that_asks_for_code_is_refused(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("COTERIE_TEST_TRAP", str(trap))
    write(tmp_path, small_model(CONFIG))
    path = tmp_path / "global_step7" / f"{file}_model_states.pt"
    torch.save({"module": {}, "evil": _Payload()}, path)
    with pytest.raises(ValueError, match=r"read safely: it asks for '(posix|nt|os)\.mkdir'") as caught:
        open_deepspeed(tmp_path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


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
    model = small_model(CONFIG)
    args = argparse.Namespace(model_type=ModelType(), **vars(arguments(CONFIG)))
    write(tmp_path, model, args=args, rng_state=[{"np": numpy.random.get_state()}])
    monkeypatch.delitem(sys.modules, "megatron.core.enums")
    _same(_opened(tmp_path), model)
    allowed = (ModelType, "megatron.core.enums.ModelType")  # as megatron-core does for its own, when it is imported
    with torch.serialization.safe_globals([allowed]):
        _same(_opened(tmp_path), model)
        assert allowed in torch.serialization.get_safe_globals()


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
    write(tmp_path, small_model(CONFIG), change=lambda data: change(data["args"]))
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
    write(tmp_path, small_model(CONFIG), change=change)
    with pytest.raises(ValueError, match=words):
        open_deepspeed(tmp_path)


def test_files_that_do_not_belong_are_named(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            open_deepspeed(tmp_path)
        assert "\n" not in str(caught.value)

    step = write(tmp_path, small_model(CONFIG), 2) / "global_step7"
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
    model = small_model(CONFIG)
    with torch.no_grad():
        model.moe_layers[0].experts.w_in[1, 0, 2, 3] = torch.nan
    _, source = open_deepspeed(write(tmp_path, model))
    with pytest.raises(ValueError, match=r"blocks\.1\.moe\.experts\.w_in holds a NaN"):
        source.read("blocks.1.moe.experts.w_in", ())
