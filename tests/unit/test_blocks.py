"""The block pool: references, prefix reuse, eviction."""

from __future__ import annotations

import pytest

from cluster.blocks import BlockPool

SIZE = 4


def sealed(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Blocks for `tokens` (whole blocks), held once and sealed as a sequence would."""
    blocks = pool.allocate(len(tokens) // pool.block_size)
    assert blocks is not None
    for i, block in enumerate(blocks):
        parent = blocks[i - 1] if i else None
        pool.seal(block, tokens[i * SIZE : (i + 1) * SIZE], parent, salt)
    return blocks


def test_allocation_counts_and_refuses_whole() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(3)
    assert blocks is not None
    assert len(set(blocks)) == 3
    assert (pool.used, pool.free_blocks, pool.blocks) == (3, 1, 4)
    assert pool.allocate(2) is None
    assert pool.free_blocks == 1
    pool.free(blocks)
    assert (pool.used, pool.free_blocks) == (0, 4)


@pytest.mark.parametrize(("positions", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_rounds_up(positions: int, blocks: int) -> None:
    assert BlockPool(8, SIZE).blocks_for(positions) == blocks


def test_match_finds_the_longest_prefix_and_leaves_a_token_to_compute() -> None:
    pool = BlockPool(8, SIZE)
    tokens = list(range(12))
    blocks = sealed(pool, tokens)
    assert pool.match([*tokens, 99]) == blocks
    assert pool.match(tokens) == blocks[:2]
    assert pool.match([*tokens[:8], 99, 99, 99, 99, 99]) == blocks[:2]
    assert pool.match([99, *tokens[1:]]) == []


def test_a_block_matches_only_after_the_same_prefix() -> None:
    pool = BlockPool(8, SIZE)
    sealed(pool, [1, 1, 1, 1, 2, 2, 2, 2])
    assert pool.match([2, 2, 2, 2, 0]) == []


def test_salts_do_not_share() -> None:
    pool = BlockPool(8, SIZE)
    blocks = sealed(pool, [1, 2, 3, 4], b"alice")
    assert pool.match([1, 2, 3, 4, 5], b"bob") == []
    assert pool.match([1, 2, 3, 4, 5]) == []
    assert pool.match([1, 2, 3, 4, 5], b"alice") == blocks


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    pool = BlockPool(4, SIZE)
    tokens = [1, 2, 3, 4]
    blocks = sealed(pool, tokens)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.used == 1
    pool.free(blocks)
    assert pool.used == 0
    assert pool.match([*tokens, 5]) == blocks
    pool.share(blocks)
    assert pool.used == 1


def test_free_blocks_go_first_then_the_least_recently_freed() -> None:
    pool = BlockPool(4, SIZE)
    old, new = [1] * SIZE, [2] * SIZE
    old_blocks, new_blocks = sealed(pool, old), sealed(pool, new)
    pool.free(old_blocks)
    pool.free(new_blocks)
    assert pool.allocate(2) is not None
    assert pool.match([*old, 0]) == old_blocks
    assert pool.allocate(1) == old_blocks
    assert pool.match([*old, 0]) == []
    assert pool.match([*new, 0]) == new_blocks


def test_a_prefix_is_evicted_from_its_end() -> None:
    pool = BlockPool(3, SIZE)
    tokens = list(range(12))
    blocks = sealed(pool, tokens)
    pool.free(blocks)
    assert pool.allocate(1) == blocks[2:]
    assert pool.match([*tokens, 0]) == blocks[:2]


def test_equal_contents_are_kept_once() -> None:
    pool = BlockPool(4, SIZE)
    tokens = [7] * SIZE
    first, second = sealed(pool, tokens), sealed(pool, tokens)
    assert first != second
    assert pool.match([*tokens, 0]) == first
    pool.free(first)
    pool.free(second)
    assert pool.free_blocks == 4
    assert pool.match([*tokens, 0]) == first
    # Three are free; were the second kept as well, the third would have evicted the first.
    assert pool.allocate(3) is not None
    assert pool.match([*tokens, 0]) == first


def test_a_duplicate_takes_over_when_the_first_was_evicted() -> None:
    pool = BlockPool(2, SIZE)
    tokens = [7] * SIZE
    first, second = sealed(pool, tokens), sealed(pool, tokens)
    pool.free(first)
    assert pool.allocate(1) == first
    pool.free(second)
    assert pool.match([*tokens, 0]) == second


def test_children_of_a_duplicate_are_found() -> None:
    pool = BlockPool(6, SIZE)
    first = sealed(pool, [7] * SIZE)
    longer = sealed(pool, [7] * SIZE + [8] * SIZE)
    assert pool.match([7] * SIZE + [8] * SIZE + [0]) == [first[0], longer[1]]


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(4, SIZE, prefix_caching=False)
    blocks = sealed(pool, [1] * SIZE)
    assert pool.match([1] * SIZE + [0]) == []
    pool.free(blocks)
    assert pool.free_blocks == 4


def test_clear_forgets_holders_and_contents() -> None:
    pool = BlockPool(4, SIZE)
    sealed(pool, [1] * SIZE)
    pool.clear()
    assert pool.free_blocks == 4
    assert pool.match([1] * SIZE + [0]) == []
    assert sorted(pool.allocate(4) or []) == [0, 1, 2, 3]
