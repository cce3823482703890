"""Which replica has a prompt's beginning in its KV cache, as far as an edge can know."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection

from cluster.jobs import cache_salt
from cluster.request import Request

# A multiple of every block size: what ends at a chunk's end, ends at a block's.
CHUNK_TOKENS = 128
_MOST_CHUNKS = 64
_MOST_KNOWN = 1 << 16

Chain = tuple[bytes, ...]


def chain_of(request: Request) -> Chain:
    """A hash for each whole chunk at the prompt's beginning, which stands for all that comes
    before it, the cache salt included; none where KV blocks are not shared."""
    if not request.cache:
        return ()
    chunks = min(len(request.prompt) // CHUNK_TOKENS, _MOST_CHUNKS)
    last, chain = cache_salt(request), []
    for start in range(0, chunks * CHUNK_TOKENS, CHUNK_TOKENS):
        tokens = array("Q", request.prompt[start : start + CHUNK_TOKENS])
        last = hashlib.blake2b(last + tokens.tobytes(), digest_size=16).digest()
        chain.append(last)
    return tuple(chain)


class Affinity:
    """Remembers which replica was last sent which beginnings; what was not used longest is
    forgotten."""

    def __init__(self) -> None:
        self._last: OrderedDict[bytes, str] = OrderedDict()

    def favourite(self, chain: Chain, replicas: Collection[str]) -> str | None:
        """Of `replicas`, the one that knows most of the prompt. For a beginning that none knows,
        the one that every edge would name (highest random weight hashing); None without one."""
        for link in reversed(chain):
            if (name := self._last.get(link)) in replicas:
                return name
        if not chain or not replicas:
            return None
        return max(replicas, key=lambda name: _weight(chain[0], name))

    def note(self, chain: Chain, replica: str) -> None:
        for link in chain:
            self._last[link] = replica
            self._last.move_to_end(link)
        while len(self._last) > _MOST_KNOWN:
            self._last.popitem(last=False)


def _weight(link: bytes, replica: str) -> bytes:
    return hashlib.blake2b(link + replica.encode(), digest_size=8).digest()
