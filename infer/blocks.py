"""Memory for keys and values in blocks of a fixed number of tokens: who owns which, and what can be used again.

No torch: a block is a number. The runner keeps the tensors and obeys the tables and the copies that it is told.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

Copy = tuple[int, int]
"""(from block, to block)"""


def root_digest(salt: str) -> bytes:
    """Where the chain of digests of all sequences with this salt begins."""
    return sha256(b"coterie keys and values\0" + salt.encode(errors="surrogatepass")).digest()


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block: its tokens and, through the parent, all before them and the salt.

    sha256, so that nobody can make a prompt which collides with another's and read its answer's cache.
    """
    return sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """A fixed number of blocks with reference counts, and a cache of the full ones by digest.

    A block is blank (free, content worth nothing), idle (free, but found by its digest until the room is needed:
    least recently used first) or owned by one table or more. Only a block with one owner and no digest is written.

    Attributes:
        count: blocks in all.
        size: tokens a block.
        queried, hit: tokens looked up in the prefix cache and found there, in all.
        evicted: idle blocks whose content was given up for room, in all.
    """

    def __init__(self, count: int, size: int) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"{count} blocks of {size} tokens hold nothing: give at least 1 of each")
        self.count, self.size = count, size
        self.queried = self.hit = self.evicted = 0
        self._owners = [0] * count
        self._digest: list[bytes | None] = [None] * count
        self._found: dict[bytes, int] = {}
        self._blank = list(range(count - 1, -1, -1))
        self._idle: dict[int, None] = {}  # in the order of their release

    @property
    def free(self) -> int:
        """Blocks that can be allocated now, idle ones too."""
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        return self.count - self.free

    @property
    def cached(self) -> int:
        """Blocks that a prefix can be found in, owned or idle."""
        return len(self._found)

    def owners(self, block: int) -> int:
        return self._owners[block]

    def published(self, block: int) -> bool:
        return self._digest[block] is not None

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one owner each, or None, and nothing changed, when fewer are free."""
        if count > self.free:
            return None
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block = next(iter(self._idle))
                del self._idle[block]
                self.unpublish(block)
                self.evicted += 1
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One owner more for each; idle ones come back."""
        for block in blocks:
            if not self._owners[block]:
                del self._idle[block]  # KeyError: a blank block holds nothing to share
            self._owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each. The last of a sequence goes first, so that the start of a prefix stays longest."""
        for block in reversed(blocks):
            if self._owners[block] < 1:
                raise RuntimeError(f"block {block} is released more often than it was taken")
            self._owners[block] -= 1
            if not self._owners[block]:
                if self._digest[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix. They are not taken: `share` them."""
        blocks = []
        for digest in digests:
            if (block := self._found.get(digest)) is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Lets others find a full, computed block. A second block of the same content stays its owner's alone."""
        if self._digest[block] is None and digest not in self._found:
            self._digest[block] = digest
            self._found[digest] = block

    def unpublish(self, block: int) -> None:
        """The block can no longer be found, and may be written."""
        digest, self._digest[block] = self._digest[block], None
        if digest is not None:
            del self._found[digest]

    def clear_cache(self) -> None:
        """Forgets all that is cached: for new weights. Owned blocks stay with their owners."""
        for block in list(self._found.values()):
            self.unpublish(block)
        self._blank.extend(self._idle)
        self._idle.clear()


@dataclass(slots=True, eq=False)
class BlockTable:
    """One sequence's blocks, in the order of its tokens, and the digests of those that are full."""

    pool: BlockPool
    salt: str = ""
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Of the full blocks of its known tokens, computed yet or not; they outlive the blocks."""
    published: int = 0
    """So many of the first blocks were offered to the cache."""

    def reuse(self, tokens: Sequence[int]) -> int:
        """Takes the cached blocks of a table that has none; returns how many tokens need no computing.

        The last token is always left to compute, since its logits are wanted.
        """
        assert not self.blocks
        self._extend(tokens, len(tokens) // self.pool.size)
        self.blocks = self.pool.find(self.digests)
        self.pool.share(self.blocks)
        self.published = len(self.blocks)
        return min(self.published * self.pool.size, len(tokens) - 1)

    def grow(self, start: int, end: int) -> list[Copy] | None:
        """Makes positions start to end (exclusive) this table's own to write.

        Returns:
            The copies that the runner makes before it writes, or None, and nothing changed, when too few blocks
            are free.
        """
        pool = self.pool
        first = start // pool.size
        shared = self._shared(first)
        fresh = pool.allocate(self.needs(start, end))
        if fresh is None:
            return None
        copies = []
        for i in shared:
            old, new = self.blocks[i], fresh.pop()
            copies.append((old, new))
            self.blocks[i] = new
            pool.release([old])
        self.blocks += fresh
        # A block of one's own that others could find is taken out of the cache while it changes.
        for block in self.blocks[first:]:
            pool.unpublish(block)
        self.published = min(self.published, first)
        return copies

    def needs(self, start: int, end: int) -> int:
        """How many blocks `grow` would allocate."""
        more = max(0, self.pool.blocks_for(end) - len(self.blocks))
        return len(self._shared(start // self.pool.size)) + more

    def _shared(self, first: int) -> list[int]:
        return [i for i in range(first, len(self.blocks)) if self.pool.owners(self.blocks[i]) > 1]

    def fork(self, tokens: int) -> BlockTable:
        """A table that shares the blocks of the first `tokens` tokens; whoever writes into one copies it first."""
        blocks = self.blocks[: self.pool.blocks_for(tokens)]
        self.pool.share(blocks)
        full = tokens // self.pool.size
        return BlockTable(self.pool, self.salt, blocks, self.digests[:full], min(self.published, full))

    def trim(self, tokens: int) -> None:
        """Gives back the blocks past the first `tokens` tokens."""
        keep = self.pool.blocks_for(tokens)
        self.pool.release(self.blocks[keep:])
        del self.blocks[keep:]
        self.published = min(self.published, keep)

    def publish(self, tokens: Sequence[int], computed: int) -> None:
        """Offers every full block of the first `computed` tokens to the cache."""
        full = computed // self.pool.size
        self._extend(tokens, full)
        for i in range(self.published, full):
            self.pool.publish(self.blocks[i], self.digests[i])
        self.published = max(self.published, full)

    def release(self) -> None:
        """Gives all blocks back. What was published can be found until its room is needed."""
        self.trim(0)

    def _extend(self, tokens: Sequence[int], full: int) -> None:
        size = self.pool.size
        for i in range(len(self.digests), full):
            parent = self.digests[i - 1] if i else root_digest(self.salt)
            self.digests.append(chain_digest(parent, tokens[i * size : (i + 1) * size]))
