"""Experts come whole to where they are wanted, and those that stay keep their slots."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from coterie.infer.moving import pack_pieces, pack_slots, unpack_pieces, unpack_slots
from coterie.infer.rearrange import arrange, pieces, targets


@st.composite
def changes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Slots there are and slots that are wanted: of each expert one copy at least, and none twice on a share."""
    shares, even, spare = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    experts = shares * even

    def some() -> np.ndarray:
        order = draw(st.permutations(range(experts)))
        slots_PC = np.full((shares, even + spare), -1)
        for share in range(shares):
            mine = list(order[share * even : (share + 1) * even])
            others = [expert for expert in range(experts) if expert not in mine]
            copies = draw(st.lists(st.sampled_from(others), max_size=spare, unique=True)) if others else []
            row = draw(st.permutations([*mine, *copies]))
            slots_PC[share, : len(row)] = row
        return slots_PC

    return some(), some()


@given(changes(), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 20))
def test_all_that_is_wanted_comes_whole(change: tuple[np.ndarray, np.ndarray], sizes: list[int], most: int) -> None:
    now_PC, wanted_PC = change
    new_PC, fetches = arrange(now_PC, wanted_PC)
    for now, new, wanted in zip(now_PC, new_PC, wanted_PC, strict=True):
        assert sorted(set(new) - {-1}) == sorted(set(wanted) - {-1})
        kept = (now >= 0) & np.isin(now, wanted)
        assert (new[kept] == now[kept]).all()
    # Every number is what it is called; slots are written when all has come.
    memory = [[[[(expert, t, i) for i in range(n)] for t, n in enumerate(sizes)] for expert in row] for row in now_PC]
    come: dict[tuple[int, int], list[list]] = {}
    for turn in pieces(0, fetches, sizes, most):
        got = np.zeros(len(now_PC), int)
        for piece in unpack_pieces(pack_pieces(turn)):
            fetch = piece.fetch
            room = come.setdefault((fetch.share, fetch.slot), [[None] * n for n in sizes])
            sent = memory[fetch.source][fetch.source_slot][piece.tensor][piece.begin : piece.end]
            assert room[piece.tensor][piece.begin : piece.end] == [None] * len(sent)
            room[piece.tensor][piece.begin : piece.end] = sent
            got[fetch.share] += len(sent)
        assert got.max() <= most
    for (share, slot), tensors in come.items():
        memory[share][slot] = tensors
    for share, row in enumerate(new_PC):
        for slot, expert in enumerate(row):
            if expert >= 0:
                assert memory[share][slot] == [[(expert, t, i) for i in range(n)] for t, n in enumerate(sizes)]


@given(changes())
def test_what_stays_is_not_fetched(change: tuple[np.ndarray, np.ndarray]) -> None:
    now_PC, wanted_PC = change
    assert not arrange(now_PC, now_PC)[1]
    fetched = sum(len(set(w) - set(n) - {-1}) for n, w in zip(now_PC, wanted_PC, strict=True))
    assert len(arrange(now_PC, wanted_PC)[1]) == fetched


@given(changes())
def test_every_token_has_a_share_that_holds_its_expert(change: tuple[np.ndarray, np.ndarray]) -> None:
    slots_PC = change[0]
    target_PE = targets(slots_PC, int(slots_PC.max()) + 1)
    for row in target_PE:
        assert all(expert in slots_PC[share] for expert, share in enumerate(row))


def test_a_copy_comes_from_the_own_node_and_from_who_sends_least() -> None:
    now_PC = np.array([[0, 1], [0, 2], [3, 1], [3, -1]])
    wanted_PC = np.array([[0, 1], [0, 2], [3, 1], [3, 1]])
    assert [f.source for f in arrange(now_PC, wanted_PC, nodes=2)[1]] == [2]
    wanted_PC = np.array([[0, 3], [1, 2], [3, 1], [3, 0]])
    assert [f.source for f in arrange(now_PC, wanted_PC)[1]] == [2, 0, 1]


def test_slots_arrive_as_they_were_sent() -> None:
    slots_PC = np.array([[0, 1, -1], [2, 3, 0]])
    layer, got_PC = unpack_slots(pack_slots(7, slots_PC))
    assert layer == 7
    assert (got_PC == slots_PC).all()
