"""Stop strings in streamed text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.infer.stops import StopMatcher, StoppingText, stop_ids
from coterie.models.tokenizer import EOS, train_bpe

TOKENIZER = train_bpe(["abab aab baa é€😀 abba\n\n"] * 40, 290)
# The ids of every byte sequence that is a token.
BYTES = {}
for _id in range(1, TOKENIZER.vocab_size):
    _name = TOKENIZER._inner.id_to_token(_id)
    BYTES[_name] = _id
TEXT = st.text(st.sampled_from("aab é€😀\n\ufffd"), max_size=40)
STOPS = st.lists(st.text(st.sampled_from("aab é😀\n"), min_size=1, max_size=6), max_size=4)


def whole(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the stop string that ends first, by looking at all of it."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include else end - len(stop)], stop


def cut(text: str, data: st.DataObject) -> list[int]:
    """Ids of the text, cut into tokens anyhow, also inside a character."""
    # The names of byte-level tokens, one character for each byte.
    name = "".join(piece for piece, _ in _byte_level(text))
    ids, place = [], 0
    while place < len(name):
        fits = [n for n in range(1, 9) if place + n <= len(name) and name[place : place + n] in BYTES]
        size = data.draw(st.sampled_from(fits))
        ids.append(BYTES[name[place : place + size]])
        place += size
    return ids


def _byte_level(text: str) -> list[tuple[str, tuple[int, int]]]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text) if text else []


@settings(max_examples=400, deadline=None)
@given(TEXT, STOPS, st.booleans(), st.data())
def test_any_split_into_tokens_stops_at_the_same_place(text, stops, include, data) -> None:
    stream = StoppingText(TOKENIZER, stops, include_stop=include)
    told = ""
    for token in cut(text, data):
        told += stream.push(token)
    told += stream.finish()
    assert (told, stream.stopped) == whole(text, stops, include)
    if stream.stopped is not None:
        assert stream.push(TOKENIZER.encode("a")[0]) + stream.finish() == ""


@settings(max_examples=400, deadline=None)
@given(TEXT, STOPS, st.booleans(), st.data())
def test_what_is_held_back_could_become_a_stop_string_and_nothing_else_is(text, stops, include, data) -> None:
    matcher, told, seen = StopMatcher(stops, include=include), "", 0
    while seen < len(text) and matcher.stopped is None:
        size = data.draw(st.integers(1, 5))
        told += matcher.push(text[seen : seen + size])
        seen += size
        if matcher.stopped is None:
            ends = [n for s in stops for n in range(1, len(s)) if text[:seen].endswith(s[:n])]
            assert told == text[: min(seen, len(text)) - max(ends, default=0)]
    assert (told + matcher.finish(), matcher.stopped) == whole(text, stops, include)


def test_a_stop_string_leaks_no_part_of_itself() -> None:
    stream = StoppingText(TOKENIZER, ["\n\nQ:"])
    pieces = [stream.push(i) for char in "yes\n\n\nQ: no" for i in TOKENIZER.encode(char)]
    assert "".join(pieces) == "yes\n"
    assert stream.stopped == "\n\nQ:"
    assert stream.finish() == ""


def test_what_began_like_a_stop_string_comes_at_the_end() -> None:
    stream = StoppingText(TOKENIZER, ["abc"])
    assert [stream.push(i) for char in "xab" for i in TOKENIZER.encode(char)] == ["x", "", ""]
    assert stream.finish() == "ab"
    assert stream.stopped is None


def test_of_strings_that_end_together_the_longest_counts() -> None:
    for stops in (["b", "ab"], ["ab", "b"]):
        matcher = StopMatcher(stops)
        assert (matcher.push("xab"), matcher.stopped) == ("x", "ab")


def test_a_character_waits_for_its_bytes() -> None:
    ids = [BYTES[c] for c in _byte_level("😀")[0][0]]
    stream = StoppingText(TOKENIZER)
    assert [stream.push(i) for i in ids] == ["", "", "", "😀"]
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_special_tokens_have_no_text() -> None:
    stream = StoppingText(TOKENIZER, ["ab"])
    assert [stream.push(i) for i in (*TOKENIZER.encode("a"), TOKENIZER.eos_id, *TOKENIZER.encode("b"))] == [""] * 3
    assert stream.stopped == "ab"
    assert stop_ids(TOKENIZER, ["ab", EOS, "a", ""]) == {TOKENIZER.eos_id: EOS}


def test_no_stop_string_is_found_before_the_least_number_of_tokens() -> None:
    ids = [i for char in "abab" for i in TOKENIZER.encode(char)]
    for least, expected in ((0, ""), (2, ""), (3, "ab"), (4, "ab"), (5, "abab")):
        stream = StoppingText(TOKENIZER, ["ab"], min_tokens=least)
        assert "".join([stream.push(i) for i in ids]) + stream.finish() == expected


def test_hostile_strings_take_linear_time() -> None:
    matcher = StopMatcher(["a" * 50_000 + "b", "a" * 49_999 + "c"])
    text = "".join(matcher.push("a") for _ in range(200)) + matcher.push("a" * 200_000) + matcher.finish()
    assert text == "a" * 200_200


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopMatcher(["a", ""])
