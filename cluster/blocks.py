"""The paged KV pool as the driver sees it: which block is whose, and what a free one still holds.

A block is `block_size` consecutive positions of one sequence. Blocks are counted by reference, so
that sequences with a common prefix share them. A full block is *sealed*: registered under a hash of
everything up to its end. A sealed block that nobody holds keeps its contents until the room is
needed, least recently freed first. Every operation is O(1) per block it names.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

# 128 bits: a collision would show one user's cache to another, so it must not be findable.
_DIGEST_BYTES = 16


def _root(salt: bytes) -> bytes:
    return blake2b(salt, digest_size=_DIGEST_BYTES, person=b"salt").digest()


def _extend(parent: bytes, tokens: Sequence[int]) -> bytes:
    packed = struct.pack(f"<{len(tokens)}i", *tokens)
    return blake2b(parent + packed, digest_size=_DIGEST_BYTES, person=b"block").digest()


class BlockPool:
    """`blocks` KV blocks of `block_size` positions each, numbered from 0.

    A block is held (by one or more references), cached (nobody's, contents known) or free. Cached
    and free ones both count as `free_blocks`: an allocation takes free ones first and then evicts
    cached ones. Misuse of blocks (freeing what is not held) is a bug here, never a user's.
    """

    def __init__(self, blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.clear()

    def clear(self) -> None:
        """Forget all references and all contents: the ranks' KV memory is new."""
        self._references = [0] * self.blocks
        self._digests: list[bytes | None] = [None] * self.blocks
        self._free = list(range(self.blocks - 1, -1, -1))
        self._by_digest: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def used(self) -> int:
        """Blocks held by at least one sequence."""
        return self.blocks - self.free_blocks

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def match(self, tokens: Sequence[int], salt: bytes = b"") -> list[int]:
        """Blocks that hold the longest known prefix of `tokens`; `share` them to keep them.

        Whole blocks only, and never all of `tokens`: the last token has to be computed for its
        logits. Hashing stops at the first unknown block.
        """
        found: list[int] = []
        if not self.prefix_caching:
            return found
        size, digest = self.block_size, _root(salt)
        for start in range(0, len(tokens) - size, size):
            digest = _extend(digest, tokens[start : start + size])
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and no change) if there are too few."""
        if count > self.free_blocks:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            digest = self._digests[block]
            assert digest is not None
            del self._by_digest[digest]
            self._digests[block] = None
        self._references[block] = 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of `blocks`, which come from `match` or are held."""
        for block in blocks:
            if self._references[block] == 0:
                del self._evictable[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each of `blocks`, which are a sequence's in order."""
        # Last first: a prefix is of no use without what comes before it, so its end is evicted
        # before its beginning.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is freed but not held"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._release(block)

    def _release(self, block: int) -> None:
        digest = self._digests[block]
        # Of several blocks with equal contents one is enough to keep.
        if digest is not None and self._by_digest.setdefault(digest, block) == block:
            self._evictable[block] = None
        else:
            self._digests[block] = None
            self._free.append(block)

    def seal(
        self, block: int, tokens: Sequence[int], parent: int | None, salt: bytes = b""
    ) -> None:
        """Register a held block whose `block_size` positions are computed and hold `tokens`.

        `parent` is the sequence's previous block, sealed before it; None for its first. Contents
        that another block already has stay registered there.
        """
        if not self.prefix_caching:
            return
        assert len(tokens) == self.block_size
        assert self._references[block] > 0
        root = _root(salt) if parent is None else self._digests[parent]
        assert root is not None, f"block {block} is sealed before its parent {parent}"
        digest = _extend(root, tokens)
        self._digests[block] = digest
        self._by_digest.setdefault(digest, block)
