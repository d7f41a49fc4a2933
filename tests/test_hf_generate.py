"""`coterie generate` on directories of other projects, with their own tokenizers and ends of a text."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from hf_models import FAMILIES, config_for, model_of, opened

from coterie.cli import main
from coterie.infer.pipeline import stream_text
from coterie.models.tokenizer import TextStream, Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = "the cat sat on a mat and saw many dogs"
WORDS = ["<unk>", "<s>", "</s>", "<end>", *(f"\u2581{word}" for word in TEXT.split())]


def _tokenizer(folder: Path) -> None:
    """A tokenizer in the manner of Llama: spaces belong to words, and <s> begins every text."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    inner.add_special_tokens(["<s>", "</s>", "<end>"])
    inner.save(str(folder / "tokenizer.json"))


def _model(folder: Path, family: str, seed: int = 0) -> None:
    config = config_for(family, seed)
    config.vocab_size = len(WORDS)
    model_of(config).save_pretrained(folder)
    _tokenizer(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_writes_what_transformers_writes(tmp_path: Path, family: str, capsys) -> None:
    _model(tmp_path, family)
    ids = torch.tensor([[1, 4, 5]])
    theirs = opened(tmp_path)
    out = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=10**6, pad_token_id=0)
    expected = Tokenizer(tmp_path).decode(out[0].tolist())
    for name in ("config.json", "generation_config.json"):  # no end that would stop them early
        data = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(data | {"eos_token_id": None}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<unk>"}))
    main(["generate", str(tmp_path), "--prompt", "the cat", "--max-new-tokens", "8", "--greedy"])
    printed = capsys.readouterr().out.rstrip("\n")
    if 0 not in out[0].tolist():
        assert printed == expected


def test_a_prompt_begins_as_the_tokenizer_says(tmp_path: Path) -> None:
    _model(tmp_path, "llama")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("the cat") == [4, 5]
    assert tokenizer.encode_prompt("the cat") == [1, 4, 5]  # without the end that the template would set
    assert tokenizer.encode_prompt("") == [1]


def test_the_space_before_the_first_new_word_is_told(tmp_path: Path) -> None:
    _tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    stream = TextStream(tokenizer, [1, 4, 5])
    assert [stream.push(token) for token in (6, 7)] == [" sat", " on"]
    assert TextStream(tokenizer).push(6) == "sat"


@pytest.mark.parametrize(
    ("generation", "config", "eos", "ends"),
    [
        ([3, 2], 1, 3, (3, 2)),  # generation_config.json comes first
        (None, 3, 3, (3,)),
        (None, None, 2, (2,)),  # a usual name: </s>
        (None, 50279, 2, (2, 50279)),  # no token of this tokenizer
    ],
)
def test_what_ends_a_text(tmp_path: Path, generation, config, eos: int, ends: tuple[int, ...]) -> None:
    _tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (eos, ends)


def test_any_of_several_ends_stops(tmp_path: Path) -> None:
    _model(tmp_path, "llama")
    text = list(stream_text(tmp_path, "the cat", max_new_tokens=8, temperature=0.0))
    tokenizer = Tokenizer(tmp_path)
    ids = opened(tmp_path).generate(torch.tensor([[1, 4, 5]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    last = ids[0, 5].item()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [10**6 % 9999, last]}))
    shorter = "".join(stream_text(tmp_path, "the cat", max_new_tokens=8, temperature=0.0))
    assert shorter == tokenizer.decode(ids[0, :5].tolist())[len("the cat") :]
    assert len(shorter) < len("".join(text))


def test_wrong_ends_are_refused(tmp_path: Path) -> None:
    _tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match="has eos_token_id '</s>', expected an id or a list of ids"):
        Tokenizer(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path, capsys) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path), "--prompt", "the cat"])
    assert "pytorch_model.bin is a pickle, which is never opened" in capsys.readouterr().err


def test_what_coterie_lacks_is_one_sentence(tmp_path: Path, capsys) -> None:
    _model(tmp_path, "mixtral")
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"sliding_window": 7}))
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path), "--prompt", "the cat"])
    assert capsys.readouterr().err == (
        "coterie: config.json of a mixtral model: sliding_window is 7 of 64 positions, which coterie lacks\n"
    )
