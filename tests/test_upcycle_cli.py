"""`coterie upcycle`: a directory that says what the dense one says, or one sentence and no directory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close_rms, rms_ratio
from runs import build
from safetensors.torch import load_file

from coterie.cli import main
from coterie.models.config import ModelConfig
from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.models.weights import load_model, read_config, save_model

DENSE = ModelConfig(vocab_size=300, max_positions=32, layers=4, dim=24, heads=3, hidden=48, init_std=0.2)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    save_model(folder, build(DENSE), train_bpe(["some text"], 300))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    (folder / "odd.py").write_text("raise SystemExit")
    return folder


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load_model(folder, dtype=torch.float32).eval()(tokens).logits_BSV


@pytest.mark.parametrize(
    ("options", "experts", "hidden"),
    [
        ("--experts 8", (8,) * 4, 48),
        ("--experts 8 --granularity 4 --top-k 4 --every 2", (0, 8, 0, 8), 12),
        ("--experts 4 --layers 0 3 --residual", (4, 0, 0, 4), 48),
        ("--experts 0,4,8x2 --granularity 2 --max-file-size 20KB", (0, 4, 8, 8), 24),
        ("--experts 6 --granularity 4 --shared 1 --top-k 3 --score sigmoid --bias-update 0.001", (6,) * 4, 12),
    ],
)
def test_the_directory_says_what_the_dense_one_says(
    options: str, experts: tuple, hidden: int, dense: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "moe"
    main(["upcycle", str(dense), str(output), *options.split()])
    assert "The logits are those of the dense model" in capsys.readouterr().out
    config = read_config(output)
    assert (config.experts, config.expert_hidden) == (experts, hidden)
    assert_close_rms(logits(output), logits(dense), 1e-5, "logits")
    assert Tokenizer(output).encode("some text") == Tokenizer(dense).encode("some text")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (output / name).read_text() == (dense / name).read_text()
    assert not (output / "odd.py").exists()
    assert len(list(output.glob("*.safetensors"))) > 1 or "max-file-size" not in options


def test_other_types_and_other_functions(dense: Path, tmp_path: Path, capsys) -> None:
    main(["upcycle", str(dense), str(tmp_path / "bf16"), "--experts", "4", "--dtype", "bfloat16"])
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {t.dtype for n, t in stored.items() if ".gate." not in n} == {torch.bfloat16}
    assert {t.dtype for n, t in stored.items() if ".gate." in n} == {torch.float32}
    assert 1e-5 < rms_ratio(logits(tmp_path / "bf16"), logits(dense)) < 0.03
    capsys.readouterr()
    main(["upcycle", str(dense), str(tmp_path / "noisy"), "--experts", "4", "--noise", "0.1"])
    assert "not exactly those of the dense model: the experts are copies with noise" in capsys.readouterr().out
    main(["upcycle", str(dense), str(tmp_path / "raw"), "--experts", "4", "--renormalize", "none"])
    assert "not exactly those of the dense model: the weights of 2 choices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--experts 8 --granularity 5", "the dense width 48 does not divide into granularity 5 slices"),
        ("--experts 8 --granularity 4", "top_k=2 is no multiple of 4"),
        ("--experts 1 --top-k 2", "top_k=2 is more than the layer's 1 experts"),
        ("--experts many", "'many' is not a count"),
        ("--experts 8 --max-file-size none", "'none' is not a size"),
    ],
)
def test_a_mistake_gets_one_sentence_and_no_directory(
    options: str, sentence: str, dense: Path, tmp_path: Path, capsys
) -> None:
    with pytest.raises(SystemExit):
        main(["upcycle", str(dense), str(tmp_path / "moe"), *options.split()])
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "moe").exists()


def test_what_is_there_stays(dense: Path, tmp_path: Path, capsys) -> None:
    words = ["upcycle", str(dense), str(tmp_path / "moe"), "--experts", "4"]
    main(words)
    before = (tmp_path / "moe" / "config.json").read_text()
    with pytest.raises(SystemExit):
        main([*words[:-1], "8"])
    assert "moe exists" in capsys.readouterr().err
    assert (tmp_path / "moe" / "config.json").read_text() == before
    main([*words[:-1], "8", "--force"])
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["experts"] == [8] * 4
    with pytest.raises(SystemExit):
        main(["upcycle", str(tmp_path / "moe"), str(tmp_path / "again"), "--experts", "4"])
    assert "has experts already" in capsys.readouterr().err


def test_a_directory_of_hugging_face_is_upcycled(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "qwen")
    main(["upcycle", str(tmp_path / "qwen"), str(tmp_path / "moe"), "--experts", "8", "--granularity", "2"])
    tokens = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close_rms(logits(tmp_path / "moe"), theirs(tokens).logits, 1e-5, "logits")
    before, after = read_config(tmp_path / "qwen"), read_config(tmp_path / "moe")
    assert (after.experts, after.expert_hidden) == ((8, 8), 24)
    assert replace(after, experts=(), moe=before.moe) == before
