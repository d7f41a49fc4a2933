"""Training and loading byte-level BPEs."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.models.tokenizer import EOS, TextStream, Tokenizer, train_bpe

TEXTS = ["the cat sat on the mat\n", "a cat and a hat", "def f(x):\n    return x + 1\n"] * 20
TOKENIZER = train_bpe(TEXTS, 275)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids, skip_special=False) == text
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


def test_training_is_repeatable_and_merges() -> None:
    assert TOKENIZER.vocab_size == 275
    assert train_bpe(iter(TEXTS), 275).encode("the cat") == TOKENIZER.encode("the cat")
    assert len(TOKENIZER.encode("the cat sat")) < len("the cat sat") / 2
    assert TOKENIZER.encode_batch(["a cat", ""]) == [TOKENIZER.encode("a cat"), []]


def test_the_end_of_a_document() -> None:
    assert TOKENIZER.eos_id == 0
    ids = [*TOKENIZER.encode("cat"), TOKENIZER.eos_id]
    assert TOKENIZER.decode(ids) == "cat"
    assert TOKENIZER.decode(ids, skip_special=False) == "cat" + EOS


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer(path)
        assert loaded.vocab_size == 275
        assert loaded.eos_id == TOKENIZER.eos_id
        assert loaded.encode("a cat é") == TOKENIZER.encode("a cat é")


def test_the_end_may_have_another_name(tmp_path: Path) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "<stop>": 2}, []))
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="none of the usual end-of-document tokens"):
        Tokenizer(tmp_path)
    assert Tokenizer(tmp_path, eos="<stop>").eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert Tokenizer(tmp_path).eos_id == 2
    with pytest.raises(ValueError, match="no token '<end>'"):
        Tokenizer(tmp_path, eos="<end>")


def test_a_saved_tokenizer_keeps_its_end_of_a_document(tmp_path: Path) -> None:
    """Of two usual names the config says the less usual one (Qwen): the data ends documents with that."""
    import tokenizers

    both = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, EOS: 1, "<|im_end|>": 2}, []))
    both.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).eos_id == 1
    assert Tokenizer(tmp_path).files().keys() == {"tokenizer.json"}
    told = Tokenizer(tmp_path, eos="<|im_end|>")
    for path in (tmp_path / "tokenizer.json", tmp_path / "data.tokenizer.json"):
        told.save(path)
        assert Tokenizer(path).eos_id == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "tokenizer_config.json is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"eos_token": 3}', "has eos_token 3"),
    ],
)
def test_a_config_that_says_nothing_is_named(tmp_path: Path, config: str, words: str) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=words):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert Tokenizer(tmp_path).eos_id == 0


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give a tokenizer\.json or its directory"):
        Tokenizer(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="256 bytes"):
        train_bpe(TEXTS, 256)
    with pytest.raises(ValueError, match="no text"):
        train_bpe([], 275)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="aé漢🙂\n t", max_size=30))
def test_a_stream_tells_whole_characters(text: str) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(i) for i in TOKENIZER.encode(text)]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_ends_with_what_never_became_a_character() -> None:
    stream = TextStream(TOKENIZER)
    ids = TOKENIZER.encode("a漢")
    assert "".join(stream.push(i) for i in ids[:-1]) == "a"
    assert stream.finish() == "\ufffd"
