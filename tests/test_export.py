"""`coterie export`: from any layout's checkpoint the model directory that the run itself would have written."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import build, small_config, small_model
from safetensors.torch import load_file

from coterie.cli import main
from coterie.infer.open_model import open_model
from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.models.weights import load_model, save_model
from coterie.models.write import parse_bytes
from coterie.parallel.mesh import build_mesh
from coterie.train.checkpoint import Checkpointer, training_state
from coterie.train.config import DataConfig, OptimConfig, TrainConfig, to_dict
from coterie.train.export import export, find
from coterie.train.manifest import CheckpointError, Progress, read_manifest, seal_of
from coterie.train.optim import build_optimizer

FILES = ["config.json", "model.safetensors"]


def _config(run: Path) -> TrainConfig:
    """Biases of an odd width, router biases, an untied head."""
    model = small_model(bias_update=0.01)
    return small_config(run, replace(model, tied_head=False, moe=replace(model.moe, bias=True, hidden=11)))


def _save(config: TrainConfig, model: GPT, *steps: int) -> None:
    for i, (_, buffer) in enumerate(model.named_buffers()):
        buffer.copy_(torch.arange(buffer.numel()) + i)
    state = training_state(model, build_optimizer(model, OptimConfig()))
    checkpoints = Checkpointer(Path(config.run_dir) / "checkpoints", to_dict(config)["model"], keep=9)
    for step in steps:
        checkpoints.save(state, Progress(step=step))
        assert checkpoints.wait() is None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one rank with checkpoints at steps 1 and 2, and a tokenizer beside its data."""
    config = _config(tmp_path / "run")
    _save(config, build(config.model, 1), 1, 2)
    tokenizer = train_bpe(["some text"], 300)
    config = replace(config, data=DataConfig(train=(str(tmp_path / "data"),)))
    tokenizer.save(tmp_path / "data.tokenizer.json")
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(config)))
    return tmp_path / "run"


def _on_ranks(rank: int, world: int, folder: str, ep: int) -> None:
    config = _config(Path(folder) / "run")
    model = parallelize(GPT(config.model, device="meta"), build_mesh("cpu", ep=ep))
    model.init_weights(3)
    _save(config, model, 5)
    save_model(Path(folder) / "direct", model)
    save_model(Path(folder) / "direct16", model, dtype=torch.bfloat16, file_bytes=9000)


@pytest.mark.dist
@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), (4, 1)])
def test_from_several_ranks_it_is_what_the_run_writes(world: int, ep: int, tmp_path: Path) -> None:
    """Byte for byte, with experts over ranks, over copies and over all."""
    run_ranks(_on_ranks, world, str(tmp_path), ep)
    export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "out16", dtype="bfloat16", max_file_size="9KB")
    for direct, out in (("direct", "out"), ("direct16", "out16")):
        names = sorted(p.name for p in (tmp_path / direct).iterdir())
        assert sorted(p.name for p in (tmp_path / out).iterdir()) == names
        for name in names:
            assert (tmp_path / out / name).read_bytes() == (tmp_path / direct / name).read_bytes(), name
    assert len(names) > 5
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_becomes_a_model_that_generates(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["export", str(run), str(tmp_path / "out"), "--max-file-size", "20KB"])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 1
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    model, tokenizer = open_model(tmp_path / "out")
    assert isinstance(tokenizer, Tokenizer)
    expected = build(model.config, 1)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert model.moe_layers[1].gate.bias_E.tolist() == [1, 2, 3, 4]


def test_the_end_of_a_document_comes_along(run: Path, tmp_path: Path) -> None:
    """The run's tokenizer has a tokenizer_config.json where the usual names mislead."""
    (tmp_path / "data.tokenizer_config.json").write_text('{"eos_token": "m"}')
    export(run, tmp_path / "out")
    assert Tokenizer(tmp_path / "out").eos_id == Tokenizer(tmp_path / "data.tokenizer.json").encode("m")[0]
    for name in ("data.tokenizer_config.json", "data.tokenizer.json"):
        (tmp_path / name).rename(tmp_path / f"moved.{name}")
    (run / "model").mkdir()
    (run / "model" / "tokenizer.json").write_bytes((tmp_path / "moved.data.tokenizer.json").read_bytes())
    export(run, tmp_path / "out2")
    assert Tokenizer(tmp_path / "out2").vocab_size, "the run's own model/ had it"


def test_without_a_tokenizer_it_says_so(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data.tokenizer.json").unlink()
    export(run, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert "data.tokenizer.json is not there" in caplog.text


def _damage(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def test_the_newest_whole_checkpoint_or_the_one_asked_for(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (run / "checkpoints" / f"step_{step:08d}" for step in (1, 2))
    assert export(run, tmp_path / "a") == second
    assert export(run, tmp_path / "b", step=1) == first
    assert find(run / "checkpoints") == second
    assert find(first) == find(first, 1) == first
    _damage(second)
    assert export(run, tmp_path / "c") == first
    assert "step_00000002 is damaged" in caplog.text
    for source, step in ((run, 2), (second, None)):
        with pytest.raises(CheckpointError, match=r"step_00000002 is damaged: the content of .* was altered"):
            find(source, step)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7: it has those of steps 1, 2"):
        find(run, 7)
    with pytest.raises(CheckpointError, match="is the checkpoint of step 1, not 2: give the run directory"):
        find(first, 2)
    _damage(first)
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged.*no whole one to export instead"):
        find(run)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "nowhere"}, "nowhere is neither a checkpoint nor a run directory that holds one"),
        ({"output": "full"}, "full exists: give another output, or force"),
        ({"output": "full", "force": True}, "full holds no model that could be replaced"),
        ({"output": "run", "force": True}, "run holds no model that could be replaced"),
        ({"dtype": "float8"}, "dtype 'float8' is not one of keep, float32, bfloat16"),
        ({"max_file_size": "5 apples"}, "'5 apples' is not a size"),
        ({"max_file_size": "0GB"}, "'0GB' is not a size"),
    ],
)
def test_what_cannot_be_exported(options: dict[str, Any], words: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("mine")
    given = {"source": "run", "output": "out"} | options
    source, output = (tmp_path / given.pop(name) for name in ("source", "output"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words):
        export(source, output, **given)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_is_replaced_when_forced(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", max_file_size="20KB")
    with pytest.raises(ValueError, match="out exists"):
        export(run, tmp_path / "out")
    export(run, tmp_path / "out", force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*FILES, "tokenizer.json"]


def test_no_file_of_the_former_tokenizer_is_left(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where documents end is told by the new tokenizer; one that lies there is kept where there is no new one."""
    told = tmp_path / "data.tokenizer_config.json"
    told.write_text('{"eos_token": "m"}')
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    (tmp_path / "out" / "notes.txt").touch()
    told.unlink()
    export(run, tmp_path / "out", force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*FILES, "notes.txt", "tokenizer.json"]
    assert Tokenizer(tmp_path / "out").eos_id == Tokenizer(tmp_path / "data.tokenizer.json").eos_id
    (tmp_path / "data.tokenizer.json").unlink()
    export(run, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert f"data.tokenizer.json is not there: {tmp_path / 'out'} keeps the tokenizer that it had" in caplog.text


def _other_prints(manifest: dict[str, Any]) -> None:
    prints = manifest["experts"]["model.blocks.2.moe.experts.w_out"]
    prints[0], prints[2] = prints[2], prints[0]


def _other_model(manifest: dict[str, Any]) -> None:
    manifest["model"]["vocab_size"] = 62


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_prints, r"not read as it was saved: model\.blocks\.2\.moe\.experts\.w_out\[0\] holds expert 2"),
        (_other_model, r"does not hold the model that its manifest\.json describes: embed\.weight differs"),
    ],
)
def test_a_checkpoint_that_contradicts_itself(
    change: Callable[[dict], None], words: str, run: Path, tmp_path: Path
) -> None:
    path = run / "checkpoints" / "step_00000002"
    manifest = read_manifest(path)
    change(manifest)
    manifest["seal"] = seal_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=words):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from coterie.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
main(["export", *sys.argv[1:]])
"""
    words = [sys.executable, "-c", script, str(run), str(tmp_path / "out"), "--max-file-size", "25KB"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    words[-1] = "1GB"
    words[-3] = str(tmp_path / "new")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "new/model.safetensors could not be written: File too large" in done.stderr
    assert not (tmp_path / "new").exists()


# Reports by how much an export's greatest memory passes that before it, in bytes; mapped files count, with what the
# system reads ahead, and some 30 MB of modules. (ru_maxrss would begin with that of the process that started it.)
GROWTH = """
import re, sys
from coterie.models.tokenizer import Tokenizer
from coterie.train.export import export
def memory(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = memory("VmRSS")
export(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_memory_is_that_of_one_tensor(dtype: str, tmp_path: Path) -> None:
    """A model of 281 MB whose largest tensor has 50 MB is exported in that, read ahead once, and a constant."""
    model = small_model()
    model = replace(model, layers=4, dim=512, heads=8, hidden=512, experts=(4, 16, 16, 16))
    config = small_config(tmp_path / "run", replace(model, moe=replace(model.moe, hidden=768)))
    made = build(config.model)
    state = {f"model.{name}": tensor for name, tensor in made.state_dict().items()}
    sizes = [tensor.nbytes for tensor in state.values()]
    assert sum(sizes) > 250e6
    checkpoints = Checkpointer(Path(config.run_dir) / "checkpoints", to_dict(config)["model"], asynchronous=False)
    checkpoints.save(state, Progress(step=1))
    assert checkpoints.wait() is None
    words = [sys.executable, "-c", GROWTH, config.run_dir, str(tmp_path / "out"), dtype]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 2 * max(sizes) + 96e6 < 0.75 * sum(sizes)
    loaded = load_model(tmp_path / "out")
    kind = torch.float32 if dtype == "keep" else torch.bfloat16
    name = "blocks.3.moe.experts.w_out"
    assert torch.equal(loaded.get_parameter(name), made.get_parameter(name).to(kind))


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"5GB": 5 * 10**9, "1.5 gib": 3 * 2**29, "700 kb": 700_000, "12": 12, "12B": 12, "2T": 2 * 10**12}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "GB", "-1GB", "5XB", "1iB", "0.1", "nan"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_bytes(text)
