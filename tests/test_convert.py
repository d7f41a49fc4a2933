"""`coterie convert`: in from Hugging Face's layout and out again without a bit lost, from models and from runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import build, small_config, small_model
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="needs the extra hf")
import transformers
from helpers import assert_close_rms, greedy
from hf_models import CASES, opened, saved, tokens_for

from coterie.cli import main
from coterie.models.config import ModelConfig
from coterie.models.tokenizer import train_bpe
from coterie.models.weights import load_model, read_config, save_model
from coterie.moe.config import GateConfig, MoEConfig
from coterie.train.checkpoint import Checkpointer
from coterie.train.config import to_dict
from coterie.train.convert import convert
from coterie.train.export import export
from coterie.train.manifest import CheckpointError, Progress, read_manifest, seal_of

OLMOE = ModelConfig(
    vocab_size=300,
    max_positions=32,
    layers=2,
    dim=24,
    heads=3,
    hidden=20,
    qk_norm="all",
    tied_head=False,
    experts=(4, 4),
    moe=MoEConfig(top_k=2, hidden=20, gate=GateConfig(renormalize="none")),
)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "seed"), CASES[::3])
def test_in_and_out_again_is_bit_exact(family: str, seed: int, dtype: torch.dtype, tmp_path: Path) -> None:
    hf, ours, back = (tmp_path / name for name in ("hf", "ours", "back"))
    saved(hf, family, seed, dtype)
    convert(hf, ours, max_file_size="3KB")
    convert(ours, back, to="hf", max_file_size="500B")
    assert (back / "model.safetensors.index.json").exists()
    same_bits(hf, back)
    config, again = (json.loads((folder / "config.json").read_text()) for folder in (hf, back))
    assert again["model_type"] == config["model_type"] == family
    assert again["dtype"] == config["dtype"]
    for name in ("bos_token_id", "eos_token_id"):
        assert again[name] == config[name]
    model, found = opened(hf, dtype), opened(back, dtype)
    with torch.no_grad():
        assert_close_rms(found(tokens_for(model)).logits, model(tokens_for(model)).logits, 1e-5)


def test_the_command_with_all_that_lies_beside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hf, ours, back = (tmp_path / name for name in ("hf", "ours", "back"))
    saved(hf, "qwen3_moe", 1)
    train_bpe(["some text"], 300).save(hf / "tokenizer.json")
    beside = {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"eos_token_id": 3, "top_k": 7}'}
    beside |= {"special_tokens_map.json": "{}", "tokenizer_config.json": '{"eos_token": "<|endoftext|>"}'}
    for name, text in beside.items():
        (hf / name).write_text(text)
    (hf / "README.md").write_text("not the model's")
    main(["convert", str(hf), str(ours)])
    assert capsys.readouterr().out == f"{ours}\n"
    main(["convert", str(ours), str(back), "--to", "hf", "--dtype", "bfloat16"])
    assert f"{back} is a Qwen3MoeForCausalLM: AutoModelForCausalLM opens it" in capsys.readouterr().out
    generation = json.loads((back / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 3, "top_k": 7, "bos_token_id": 0}
    for name in ("chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (hf / name).read_bytes()
    assert (back / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert not (back / "README.md").exists()
    wide, narrow = tensors(hf), tensors(back)
    for name, tensor in narrow.items():
        assert torch.equal(tensor, wide[name].to(tensor.dtype))
        assert tensor.dtype == (torch.float32 if name.endswith("mlp.gate.weight") else torch.bfloat16), name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == 3


def test_what_no_architecture_expresses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A pyramid of residual MoE layers keeps our names, and transformers opens it all the same."""
    import coterie.models.transformers_model  # noqa: F401 (as the printed line says)

    model = build(replace(small_model(), vocab_size=300))
    save_model(tmp_path / "ours", model, train_bpe(["some text"], 300))
    main(["convert", str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf"])
    assert "import coterie.models.transformers_model" in capsys.readouterr().out
    same_bits(tmp_path / "ours", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == 0
    ids = torch.tensor([tokenizer("some text").input_ids])
    expected = greedy(model, ids, 5)[0]
    with torch.no_grad():
        found = theirs.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    assert found.tolist() == expected


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of an OLMoE-shaped model with one checkpoint."""
    config = small_config(tmp_path / "run", OLMOE)
    checkpoints = Checkpointer(tmp_path / "run" / "checkpoints", to_dict(config)["model"], asynchronous=False)
    state = {f"model.{name}": tensor for name, tensor in build(OLMOE).state_dict().items()}
    checkpoints.save(state, Progress(step=1))
    assert checkpoints.wait() is None
    return tmp_path / "run"


@pytest.mark.parametrize("source", ["run", "run/checkpoints/step_00000001"])
def test_a_run_becomes_a_model_that_transformers_opens_alone(source: str, run: Path, tmp_path: Path) -> None:
    for write, name in ((convert, "converted"), (export, "exported")):
        write(tmp_path / source, tmp_path / name, to="hf")
    same_bits(tmp_path / "converted", tmp_path / "exported")
    model, theirs = build(OLMOE).eval(), opened(tmp_path / "converted")
    assert type(theirs).__name__ == "OlmoeForCausalLM"
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits_BSV, atol=1e-5, rtol=1e-5)
    assert read_config(tmp_path / "converted").moe.gate.renormalize == "none"


def test_experts_are_held_against_their_prints_on_the_way_out(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "step_00000001"
    manifest = read_manifest(path)
    prints = manifest["experts"]["model.blocks.1.moe.experts.w_in"]
    prints[0], prints[2] = prints[2], prints[0]
    manifest["seal"] = seal_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"blocks\.1\.moe\.experts\.w_in\[0\] holds expert 2"):
        convert(run, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "nowhere"}, "there is no .*nowhere"),
        ({"source": "empty"}, "empty is neither a model directory"),
        ({"output": "full"}, "full exists: give another output, or force"),
        ({"output": "full", "force": True}, "full holds no model that could be replaced"),
        ({"to": "gguf"}, "to 'gguf' is not one of coterie, hf"),
        ({"dtype": "int4"}, "dtype 'int4' is not one of keep"),
        ({"max_file_size": "many"}, "'many' is not a size"),
        ({"source": "strange"}, "model_type 'bert', which coterie does not know"),
        ({"step": 3}, "a step was asked for, but .*ours is no run"),
    ],
)
def test_what_cannot_be_converted(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    for name in ("full", "empty", "strange"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    save_model(tmp_path / "ours", build(small_model()))
    save_model(tmp_path / "strange", build(small_model()))
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "bert"}')
    before = sorted(tmp_path.rglob("*"))
    given = {"source": "ours", "output": "out"} | options
    source, output = (tmp_path / given.pop(name) for name in ("source", "output"))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        convert(source, output, **given)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_model_takes_the_place_of_one(tmp_path: Path) -> None:
    """Nothing of the first is left, and a model may be converted where it lies."""
    save_model(tmp_path / "one", build(small_model()), train_bpe(["some text"], 300))
    save_model(tmp_path / "two", build(OLMOE))
    convert(tmp_path / "one", tmp_path / "out", max_file_size="9KB")
    with pytest.raises(ValueError, match="out exists"):
        convert(tmp_path / "two", tmp_path / "out")
    convert(tmp_path / "two", tmp_path / "out", force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    convert(tmp_path / "out", tmp_path / "out", to="hf", force=True)
    convert(tmp_path / "out", tmp_path / "out", force=True)
    same_bits(tmp_path / "two", tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out").embed.weight, build(OLMOE).embed.weight)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    save_model(tmp_path / "ours", build(OLMOE))
    script = """
import resource, signal, sys
from coterie.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
main(["convert", *sys.argv[1:]])
"""
    words = [sys.executable, "-c", script, str(tmp_path / "ours"), str(tmp_path / "new"), "--to", "hf"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "new/model.safetensors could not be written: File too large" in done.stderr
    assert not (tmp_path / "new").exists()
