"""What the first rank says to the others arrives as it was said, and nothing else is taken."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from coterie.infer.step import Slice
from coterie.infer.wire import Kind, Order, Part, decode, encode

NUMBERS = st.integers(0, 2**40)


@st.composite
def parts(draw: st.DrawFn) -> Part:
    few = {"max_size": 4}
    slices = tuple(
        Slice(
            ("", 0),
            draw(NUMBERS),
            tuple(draw(st.lists(NUMBERS, min_size=1, **few))),
            tuple(draw(st.lists(NUMBERS, **few))),
            False,
        )
        for _ in range(draw(st.integers(0, 3)))
    )
    copies = tuple(draw(st.lists(st.tuples(NUMBERS, NUMBERS), **few)))
    return Part(copies, slices, tuple(draw(st.lists(NUMBERS, **few))))


@given(st.lists(parts(), min_size=1, max_size=4), st.booleans())
def test_every_lane_reads_its_part(lanes: list[Part], routes: bool) -> None:
    message = encode(Kind.STEP, lanes, routes)
    tokens, rows = tuple(part.tokens for part in lanes), tuple(len(part.rows) for part in lanes)
    for lane, part in enumerate(lanes):
        assert decode(message, lane) == Order(Kind.STEP, routes, tokens, rows, part)


@pytest.mark.parametrize("kind", [Kind.PULSE, Kind.END])
def test_other_messages_have_no_parts(kind: Kind) -> None:
    assert decode(encode(kind), 3) == Order(kind, False)


@given(st.lists(parts(), min_size=1, max_size=3), st.data())
def test_half_a_message_is_refused(lanes: list[Part], data: st.DataObject) -> None:
    message = encode(Kind.STEP, lanes)
    cut = data.draw(st.integers(0, len(message) - 1))
    with pytest.raises(ValueError, match=r"a message of \d+ numbers is not (one of ours|whole)"):
        decode(message[:cut], len(lanes) - 1)


def test_a_part_that_is_not_as_it_was_told_is_refused() -> None:
    message = encode(Kind.STEP, [Part((), (Slice(("", 0), 0, (5, 6), (1,), False),), (1,))])
    assert message[4] == 2  # tokens of the lane
    message[4] = 3
    with pytest.raises(ValueError, match="is not whole"):
        decode(message, 0)


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(ValueError, match="is not one of ours"):
        decode(torch.tensor([17, 0, 0]), 0)
    with pytest.raises(ValueError, match="not one of ours"):
        decode(encode(Kind.STEP, [Part((), (), ())]), 2)
