"""Blocks of keys and values: owners, the prefix cache, copies before writing."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coterie.infer.blocks import BlockPool, BlockTable, chain_digest, root_digest


def filled(pool: BlockPool, tokens: list[int], salt: str = "") -> BlockTable:
    """A table whose tokens were all computed."""
    table = BlockTable(pool, salt)
    assert table.grow(table.reuse(tokens), len(tokens)) is not None
    table.publish(tokens, len(tokens))
    return table


def test_all_or_nothing() -> None:
    pool = BlockPool(4, 2)
    taken = pool.allocate(3)
    assert taken is not None
    assert pool.allocate(2) is None
    assert (pool.free, pool.used) == (1, 3)
    pool.release(taken)
    assert pool.free == 4


@pytest.mark.parametrize(("count", "size"), [(0, 2), (2, 0)])
def test_an_empty_pool_is_refused(count: int, size: int) -> None:
    with pytest.raises(ValueError, match="hold nothing"):
        BlockPool(count, size)


def test_a_block_is_not_released_twice() -> None:
    pool = BlockPool(2, 2)
    taken = pool.allocate(1)
    assert taken
    pool.release(taken)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(taken)


def test_a_digest_names_tokens_place_and_salt() -> None:
    a, b = root_digest("a"), root_digest("b")
    digests = {a, b, *(chain_digest(parent, tokens) for parent in (a, b) for tokens in ([1, 2], [2, 1], [1], [258]))}
    assert len(digests) == 10
    assert root_digest("\ud800") != root_digest("")  # whatever a client sends as its key


def test_a_prefix_is_found_again_by_its_salt_only() -> None:
    pool = BlockPool(8, 2)
    filled(pool, [1, 2, 3, 4, 5]).release()
    assert pool.used == 0
    assert (BlockTable(pool).reuse([1, 2, 3, 4, 9, 9]), pool.used) == (4, 2)
    assert BlockTable(pool).reuse([1, 2, 9]) == 2
    assert BlockTable(pool).reuse([3, 4, 5]) == 0  # the same tokens elsewhere are another block
    assert BlockTable(pool, "key").reuse([1, 2, 3, 4, 9]) == 0


def test_the_last_token_is_computed_again() -> None:
    pool = BlockPool(4, 2)
    filled(pool, [1, 2, 3, 4]).release()
    table = BlockTable(pool)
    assert table.reuse([1, 2, 3, 4]) == 3
    last = table.blocks[1]
    assert table.grow(3, 4) == []  # the only owner writes in place
    assert table.blocks[1] == last
    assert BlockTable(pool).reuse([1, 2, 3, 4]) == 2, "while it is written nobody finds it"
    table.publish([1, 2, 3, 4], 4)
    assert BlockTable(pool).reuse([1, 2, 3, 4]) == 3


def test_a_shared_cached_block_is_copied() -> None:
    pool = BlockPool(4, 2)
    first = filled(pool, [1, 2, 3, 4])
    second = BlockTable(pool)
    start = second.reuse([1, 2, 3, 4])
    copies = second.grow(start, 4)
    assert copies == [(first.blocks[1], second.blocks[1])]
    assert first.blocks[0] == second.blocks[0]
    assert first.blocks[1] != second.blocks[1]


def test_a_fork_copies_what_it_writes_and_the_last_owner_does_not() -> None:
    pool = BlockPool(8, 4)
    first = filled(pool, [1, 2, 3, 4, 5])
    forks = [first.fork(5), first.fork(5)]
    assert pool.used == 2
    assert forks[0].needs(4, 5) == 1
    assert forks[0].grow(4, 5) == [(first.blocks[1], forks[0].blocks[1])]
    assert first.grow(5, 6) == [(forks[1].blocks[1], first.blocks[1])]
    assert forks[1].grow(4, 5) == []
    for table in (first, *forks):
        table.release()
    assert pool.free == 8


def test_growth_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(3, 2)
    first = filled(pool, [1, 2, 3])
    fork = first.fork(3)
    before = list(fork.blocks)
    assert fork.grow(2, 6) is None  # a copy and a new block, but one is free
    assert (fork.blocks, pool.free) == (before, 1)


def test_the_least_recently_used_goes_first_and_a_prefix_from_its_end() -> None:
    pool = BlockPool(4, 1)
    filled(pool, [1, 2]).release()
    filled(pool, [3, 4]).release()
    BlockTable(pool).reuse([1, 9])  # used again, and kept
    assert pool.allocate(1)
    assert pool.evicted == 1
    assert pool.find(filled_digests(pool, [1, 2])) != []
    assert len(pool.find(filled_digests(pool, [1, 2]))) == 1
    assert len(pool.find(filled_digests(pool, [3, 4]))) == 2
    assert pool.allocate(1)
    assert len(pool.find(filled_digests(pool, [3, 4]))) == 1


def filled_digests(pool: BlockPool, tokens: list[int]) -> list[bytes]:
    digests = [root_digest("")]
    for i in range(0, len(tokens), pool.size):
        digests.append(chain_digest(digests[-1], tokens[i : i + pool.size]))
    return digests[1:]


def test_blocks_of_rejected_guesses_are_given_back() -> None:
    pool = BlockPool(4, 2)
    table = filled(pool, [1, 2, 3])
    assert table.grow(3, 8) == []
    assert pool.free == 0
    table.trim(4)
    assert pool.free == 2


def test_a_second_block_of_the_same_content_is_not_cached() -> None:
    pool = BlockPool(4, 2)
    tables = [BlockTable(pool), BlockTable(pool)]
    for table in tables:
        table.grow(0, 2)
    for table in tables:
        table.publish([1, 2], 2)
    assert pool.cached == 1
    tables[0].release()
    tables[1].release()
    assert (pool.free, pool.cached) == (4, 1)


def test_a_cleared_cache_finds_nothing_and_loses_no_block() -> None:
    pool = BlockPool(4, 2)
    filled(pool, [1, 2]).release()
    kept = filled(pool, [3, 4])
    pool.clear_cache()
    assert (pool.cached, pool.free) == (0, 3)
    assert BlockTable(pool).reuse([1, 2, 3]) == 0
    kept.release()
    assert pool.free == 4
    assert pool.allocate(4)


class Tables(RuleBasedStateMachine):
    """Tables that grow, fork, shrink and end, over a memory that shows what each of their slots holds."""

    @initialize(count=st.integers(1, 10), size=st.integers(1, 4))
    def start(self, count: int, size: int) -> None:
        self.pool = BlockPool(count, size)
        self.memory = [[()] * size for _ in range(count)]
        self.tables: list[tuple[BlockTable, list[int]]] = []

    def write(self, table: BlockTable, tokens: list[int], start: int) -> bool:
        copies = table.grow(start, len(tokens))
        if copies is None:
            return False
        for old, new in copies:
            self.memory[new] = list(self.memory[old])
        for position in range(start, len(tokens)):
            block = table.blocks[position // self.pool.size]
            assert self.pool.owners(block) == 1
            assert not self.pool.published(block)
            self.memory[block][position % self.pool.size] = (table.salt, *tokens[: position + 1])
        table.publish(tokens, len(tokens))
        return True

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), salt=st.sampled_from("ab"))
    def begin(self, tokens: list[int], salt: str) -> None:
        table = BlockTable(self.pool, salt)
        if self.write(table, tokens, table.reuse(tokens)):
            self.tables.append((table, tokens))
        else:
            table.release()

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def extend(self, data: st.DataObject, more: list[int]) -> None:
        table, tokens = data.draw(st.sampled_from(self.tables))
        if self.write(table, tokens + more, len(tokens)):
            tokens += more

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), guessed=st.integers(1, 5))
    def guess(self, data: st.DataObject, guessed: int) -> None:
        table, tokens = data.draw(st.sampled_from(self.tables))
        copies = table.grow(len(tokens), len(tokens) + guessed)
        for old, new in copies or ():
            self.memory[new] = list(self.memory[old])
        table.trim(len(tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, tokens = data.draw(st.sampled_from(self.tables))
        length = data.draw(st.integers(1, len(tokens)))
        self.tables.append((table.fork(length), tokens[:length]))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        table.release()

    @invariant()
    def all_is_there(self) -> None:
        if not hasattr(self, "pool"):
            return
        size, owners = self.pool.size, [0] * self.pool.count
        for table, tokens in self.tables:
            assert len(table.blocks) == self.pool.blocks_for(len(tokens))
            for block in table.blocks:
                owners[block] += 1
            for i in range(len(tokens)):
                assert self.memory[table.blocks[i // size]][i % size] == (table.salt, *tokens[: i + 1])
        assert owners == [self.pool.owners(block) for block in range(self.pool.count)]
        assert self.pool.used == sum(map(bool, owners))

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for table, _ in self.tables:
                table.release()
            assert self.pool.free == self.pool.count
            assert self.pool.allocate(self.pool.count) is not None


Tables.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTables = Tables.TestCase
