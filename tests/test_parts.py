"""Views in both directions over random tables: whatever box is asked for, the numbers are those of the whole."""

import itertools

import pytest
import torch
from helpers import Held
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.models.parts import Inward, Outward, Part, pieces

H, D, F, E = 3, 5, 4, 2
SHAPES = {
    "q": (H, 2, D),
    "kv": (2, H, 2, D),
    "bias": (2, H, 2),
    "experts": (E, 2, F, D),
    "fused": (E, 2, F, D),
    "norm": (D,),
}
ROWS = H * 2
TABLE = {
    "q": [Part("qkv", (D, 3 * ROWS), rows=(0, ROWS), transposed=True)],
    "kv": [Part("qkv", (D, 3 * ROWS), rows=(ROWS, 3 * ROWS), transposed=True)],
    "bias": [Part(f"b{i}", (ROWS,), at=(i,)) for i in range(2)],
    "experts": [Part(f"e{e}.{n}", (F, D), at=(e, i)) for e in range(E) for i, n in enumerate(("gate", "up"))],
    "fused": [Part("gate_up", (E, 2 * F, D))],
    "norm": [Part("norm", (D,))],
}


def ours() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def theirs() -> dict[str, Tensor]:
    view = Outward(Held(ours()), TABLE)
    return {name: view.read(name, ()) for name in view.names()}


def test_their_tensors_are_what_the_table_says() -> None:
    mine, found = ours(), theirs()
    assert torch.equal(found["qkv"][:, :ROWS].T.reshape(H, 2, D), mine["q"])
    assert torch.equal(found["qkv"][:, ROWS:].T.reshape(2, H, 2, D), mine["kv"])
    assert torch.equal(found["e1.up"], mine["experts"][1, 1])
    assert torch.equal(found["gate_up"], mine["fused"].flatten(1, 2))
    assert torch.equal(found["b1"], mine["bias"][1].flatten())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_box_comes_back(data: st.DataObject) -> None:
    view = Inward(Held(theirs()), TABLE, SHAPES)
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    box = []
    for size in SHAPES[name]:
        start = data.draw(st.integers(0, size))
        box.append(slice(start, data.draw(st.integers(start, size))))
    assert torch.equal(view.read(name, tuple(box)), ours()[name][tuple(box)])


def test_pieces_put_together_are_the_tensor() -> None:
    view = Inward(Held(theirs()), TABLE, SHAPES)
    for name, size in itertools.product(SHAPES, (1, 64, 1 << 20)):
        assert torch.equal(torch.cat(list(pieces(view, name, size))), ours()[name])


def test_all_that_does_not_fit_is_named_at_once() -> None:
    found = theirs()
    del found["b0"]
    found |= {
        "norm": torch.ones(D + 1),
        "e0.up": torch.ones(F, D, dtype=torch.int64),
        "odd": torch.ones(1),
        "rope": torch.ones(2),
    }
    with pytest.raises(ValueError, match="does not fit") as caught:
        Inward(Held(found), TABLE, SHAPES, ignored="rope")
    for part in (
        "b0 is missing",
        "norm has shape [6], expected [5]",
        "e0.up is stored as I64",
        "odd is unknown",
    ):
        assert part in str(caught.value)
    assert "rope" not in str(caught.value)
