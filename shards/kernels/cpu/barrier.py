"""Where the threads of a rank wait for each other."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit, types

from shards.collectives.kernel_parts import load_acquire, store_release

# In int64: each thread's count of barriers has a cache line of its own.
_LINE: Final = 8
# A barrier is short unless another process has the core.
_SPINS: Final = 2000

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


def counts(threads: int) -> np.ndarray:
    """What so many threads share: int64, zero."""
    return np.zeros(threads * _LINE, np.int64)


@njit(nogil=True)
def meet(shared: Any, thread: Any, threads: Any) -> None:
    """Wait until every thread has come here as often as this one. `shared`: where counts lie."""
    count = load_acquire(shared + 8 * _LINE * thread) + 1
    store_release(shared + 8 * _LINE * thread, count)
    for other in range(threads):
        spins = 0
        while load_acquire(shared + 8 * _LINE * other) < count:
            spins += 1
            if spins > _SPINS:
                _sched_yield()
