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


def _bytes_of(*values: int) -> list[int]:
    """Ids of single bytes, whole characters or not."""
    names = _byte_names()
    return [TOKENIZER._inner.token_to_id(names[value]) for value in values]


def _byte_names() -> dict[int, str]:
    """GPT-2's names of bytes: those that print stand for themselves, the rest for what follows U+0100."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [value for value in range(256) if value not in printed]
    return {v: chr(v) for v in printed} | {v: chr(256 + i) for i, v in enumerate(rest)}


def test_bytes_that_are_no_text_do_not_wait_for_ever() -> None:
    """At most three further bytes can complete a character, so at most three are held back."""
    stream, told = TextStream(TOKENIZER), ""
    for count, token in enumerate(_bytes_of(*[0xFF] * 200), 1):
        told += stream.push(token)
        assert count - 3 <= len(told) <= count
    assert len(stream._ids) < 40, "what is decoded each time grows"
    for token in TOKENIZER.encode("a cat"):
        told += stream.push(token)
    assert told + stream.finish() == "\ufffd" * 200 + "a cat"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0x61, 0xC3, 0xA9, 0xE6, 0xBC, 0xA2, 0xF0, 0x9F, 0x99, 0x82, 0xFF, 0x80])))
def test_a_stream_of_any_bytes_tells_what_they_are_at_once(values: list[int]) -> None:
    ids = _bytes_of(*values)
    stream = TextStream(TOKENIZER)
    told = "".join(stream.push(i) for i in ids) + stream.finish()
    assert told == bytes(values).decode(errors="replace") == TOKENIZER.decode(ids)


def test_a_long_stream_decodes_a_few_ids_at_a_time(monkeypatch) -> None:
    stream, most = TextStream(TOKENIZER, TOKENIZER.encode("the cat " * 500)), 0
    decode = Tokenizer.decode

    def watched(self, ids, **options):
        nonlocal most
        ids = list(ids)
        most = max(most, len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", watched)
    text = "the hat 漢 " * 100
    assert "".join(map(stream.push, TOKENIZER.encode(text))) + stream.finish() == text
    assert most <= 40


def test_bytes_of_single_tokens(tmp_path: Path) -> None:
    text = "a € b\x00 é"
    assert b"".join(TOKENIZER.token_bytes(i) or b"" for i in TOKENIZER.encode(text)) == text.encode()
    assert TOKENIZER.token_bytes(0) == EOS.encode()
    assert TOKENIZER.token_bytes(275) is None
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<0xE2>": 1, "</s>": 2}, [], byte_fallback=True))
    inner.decoder = tokenizers.decoders.ByteFallback()
    assert [Tokenizer(inner).token_bytes(i) for i in range(3)] == [b"a", b"\xe2", b"</s>"]
