"""The shared-memory collectives as compiled functions: Numba, without the interpreter's lock.

Everything moves in rounds. In round s a rank
  1. waits until every counter is >= s,
  2. writes its own slot of buffer s % 2,
  3. publishes: its counter becomes s + 1 (release),
  4. waits for the counters of the ranks it reads to be >= s + 1 (acquire), and reads their slots.
A counter at s thus also says "has read all it wanted of round s - 2", whose buffer round s writes
again: two buffers are enough, and step 1 has nearly always been satisfied by step 4 of the round
before. Acquire and release order the slots' bytes, so weakly ordered processors are correct too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types

from shards import compile_cache  # noqa: F401 - sets where what follows is kept
from shards.collectives.kernel_parts import (
    copy,
    inlined,
    load_acquire,
    narrow,
    pointer,
    store_release,
    widen,
)

# What one rank knows about its group; private to the rank, except for what the addresses point to.
STATE = np.dtype(
    [
        (field, np.int64)
        for field in (
            "rank",
            "world",
            "slot_bytes",
            "abort_address",
            "counters_address",
            "line",  # bytes from one counter to the next
            "slots_address",
            "tile_address",  # `TILE` float64
            "clock_address",  # a struct timespec
            "deadline_ns",
            "sequence",  # rounds this rank has published
            "expiry_ns",  # when the current call times out; 0 until it has waited for a while
        )
    ]
)
TILE = 2048  # elements whose partial sums stay in the first-level cache

# Status of a call, and value of the abort word.
OK = 0
ABORTED = 1
TIMED_OUT = 2  # + the rank that did not arrive

# Element types of `all_reduce`.
FLOAT32 = 0
FLOAT64 = 1
BFLOAT16 = 2
FLOAT16 = 3

# On a 2-core machine that other processes share: yielding at once lets a peer of the same core in,
# and sleeping after ~50 yields keeps three waiters from starving the one that works.
_SPINS = 200
_YIELDS = 50
_SLEEP_US = 20

# Up to here every rank reads every slot, above it each reduces a part: fewer bytes, one round more.
_DIRECT_BYTES = 32 << 10

# A sleep lasts up to the thread's timer slack longer, 50 us by default (88 us in all against 41 as
# measured): a rank that is 30 us late in a decode step must not cost its peers three times that.
_SLACK_NS = 1

_CLOCK_MONOTONIC = 1
_PR_SET_TIMERSLACK = 29
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_prctl = types.ExternalFunction("prctl", types.int32(types.int32, types.intp))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))


_ENTRIES: list[Any] = []


def _entry(function: Callable[..., Any]) -> Any:
    """A kernel that Python calls: integers in (addresses, counts), a status out."""
    try:
        compiled = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        compiled = njit(nogil=True)(function)
    _ENTRIES.append(compiled)
    return compiled


@inlined
def _state(address: Any) -> Any:
    return carray(pointer(address), 1, STATE)[0]


@inlined
def _counter(state: Any, rank: Any) -> Any:
    return state.counters_address + rank * state.line


@inlined
def _slot(state: Any, buffer: Any, rank: Any) -> Any:
    return state.slots_address + (buffer * state.world + rank) * state.slot_bytes


@inlined
def _now(state: Any) -> Any:
    _clock_gettime(_CLOCK_MONOTONIC, state.clock_address)
    clock = carray(pointer(state.clock_address), 2, np.int64)
    return clock[0] * 1_000_000_000 + clock[1]


@inlined
def _begin(state: Any) -> Any:
    """Start of a call: its deadline is not running yet. Returns the abort word."""
    state.expiry_ns = 0
    return load_acquire(state.abort_address)


@inlined
def _time_out(state: Any) -> Any:
    """Blame the rank furthest behind, and tell the others, so that all name the same one."""
    suspect, least = 0, load_acquire(_counter(state, 0))
    for rank in range(1, state.world):
        rounds = load_acquire(_counter(state, rank))
        if rounds < least:
            suspect, least = rank, rounds
    store_release(state.abort_address, TIMED_OUT + suspect)
    return TIMED_OUT + suspect


@inlined
def _await_rank(state: Any, rank: Any, rounds: Any) -> Any:
    """Until `rank` has published `rounds` rounds. Returns a status."""
    counter = _counter(state, rank)
    for _ in range(_SPINS):
        if load_acquire(counter) >= rounds:
            return OK
    polls = 0
    while load_acquire(counter) < rounds:
        status = load_acquire(state.abort_address)
        if status != OK:
            return status
        polls += 1
        if polls <= _YIELDS:
            _sched_yield()
            continue
        now = _now(state)
        if state.expiry_ns == 0:
            state.expiry_ns = now + state.deadline_ns
            _prctl(_PR_SET_TIMERSLACK, _SLACK_NS)
        elif now >= state.expiry_ns:
            return _time_out(state)
        _usleep(_SLEEP_US)
    return OK


@inlined
def _await_all(state: Any, rounds: Any) -> Any:
    for rank in range(state.world):
        status = _await_rank(state, rank, rounds)
        if status != OK:
            return status
    return OK


@inlined
def _publish(state: Any) -> None:
    state.sequence += 1
    store_release(_counter(state, state.rank), state.sequence)


@inlined
def _sum_as(
    state: Any, buffer: Any, own: Any, first: Any, count: Any, size: Any, kind: Any, wide: Any
) -> None:
    for begin in range(0, count, TILE):
        n = min(TILE, count - begin)
        tile = carray(pointer(state.tile_address), n, wide)
        sums = own + begin * size
        for rank in range(state.world):
            address = sums
            if rank != state.rank:
                address = _slot(state, buffer, rank) + (first + begin) * size
            terms = carray(pointer(address), n, kind)
            if rank == 0:
                for i in range(n):
                    tile[i] = widen(terms[i])
            else:
                for i in range(n):
                    tile[i] += widen(terms[i])
        result = carray(pointer(sums), n, kind)
        for i in range(n):
            result[i] = narrow(tile[i], kind)


@inlined
def _sum(state: Any, buffer: Any, own: Any, first: Any, count: Any, kind: Any) -> None:
    """own[i] = sum over ranks, in rank order, of element first + i; `own` holds this rank's."""
    if kind == FLOAT32:
        _sum_as(state, buffer, own, first, count, 4, np.float32, np.float32)
    elif kind == BFLOAT16:
        _sum_as(state, buffer, own, first, count, 2, np.uint16, np.float32)
    elif kind == FLOAT16:
        _sum_as(state, buffer, own, first, count, 2, np.int16, np.float32)
    else:
        _sum_as(state, buffer, own, first, count, 8, np.float64, np.float64)


@inlined
def _reduce(state: Any, x: Any, count: Any, size: Any, kind: Any, direct: Any) -> Any:
    """Sum what fits into a slot.

    Direct: everyone publishes all its elements and sums everyone's, in one round. Otherwise, in a
    first round, each rank sums one part of the elements, and in a second all collect the parts.
    """
    width = count if direct else -(-count // (state.world * 32)) * 32  # whole cache lines
    first = 0 if direct else min(count, state.rank * width)
    end = min(count, first + width)
    own = x + first * size
    status = _await_all(state, state.sequence)
    if status != OK:
        return status
    buffer = state.sequence & 1
    slot = _slot(state, buffer, state.rank)
    if direct:
        copy(slot, x, count * size)
    else:  # nobody else reads this rank's own part
        copy(slot, x, first * size)
        copy(slot + end * size, x + end * size, (count - end) * size)
    _publish(state)
    status = _await_all(state, state.sequence)
    if status != OK:
        return status
    _sum(state, buffer, own, first, end - first, kind)
    if direct:
        return OK
    buffer = state.sequence & 1
    copy(_slot(state, buffer, state.rank), own, (end - first) * size)
    _publish(state)
    for rank in range(state.world):
        first = min(count, rank * width)
        end = min(count, first + width)
        if rank == state.rank or first == end:
            continue
        status = _await_rank(state, rank, state.sequence)
        if status != OK:
            return status
        copy(x + first * size, _slot(state, buffer, rank), (end - first) * size)
    return OK


@_entry
def all_reduce(state: Any, x: Any, count: Any, size: Any, kind: Any) -> Any:
    """Sum `count` elements of `size` bytes and type `kind` at `x`, in place."""
    state = _state(state)
    capacity = state.slot_bytes // size
    direct = count * size <= min(_DIRECT_BYTES, state.slot_bytes)
    status = _begin(state)
    done = 0
    while status == OK and done < count:
        n = min(capacity, count - done)
        status = _reduce(state, x + done * size, n, size, kind, direct)
        done += n
    return status


@inlined
def _scatter(source: Any, begin: Any, end: Any, row_bytes: Any, target: Any, stride: Any) -> None:
    """Bytes begin..end of a rank's rows, `row_bytes` each, to rows that lie `stride` apart."""
    position = begin
    while position < end:
        row = position // row_bytes
        column = position - row * row_bytes
        n = min(row_bytes - column, end - position)
        copy(target + row * stride + column, source + position - begin, n)
        position += n


@_entry
def gather(state: Any, source: Any, target: Any, rows: Any, row_bytes: Any, to_all: Any) -> Any:
    """Rank r's rows, row_bytes[r] wide, side by side at `target`: on every rank, or on rank 0.

    `row_bytes` is the address of `world` int64.
    """
    state = _state(state)
    widths = carray(pointer(row_bytes), state.world, np.int64)
    stride = widths.sum()
    longest = rows * widths.max()
    own = rows * widths[state.rank]
    reads = to_all != 0 or state.rank == 0
    status = _begin(state)
    done = 0
    while status == OK and done < longest:
        status = _await_all(state, state.sequence)
        if status != OK:
            break
        buffer = state.sequence & 1
        if done < own:
            n = min(state.slot_bytes, own - done)
            copy(_slot(state, buffer, state.rank), source + done, n)
        _publish(state)
        column = 0
        for rank in range(state.world if reads else 0):
            status = _await_rank(state, rank, state.sequence)
            if status != OK:
                break
            end = min(done + state.slot_bytes, rows * widths[rank])
            slot = _slot(state, buffer, rank)
            _scatter(slot, done, end, widths[rank], target + column, stride)
            column += widths[rank]
        done += state.slot_bytes
    return status


@_entry
def broadcast(state: Any, x: Any, size: Any) -> Any:
    """Rank 0's `size` bytes at `x` to everyone's `x`."""
    state = _state(state)
    status = _begin(state)
    done = 0
    while status == OK and done < size:
        status = _await_all(state, state.sequence)
        if status != OK:
            break
        slot = _slot(state, state.sequence & 1, 0)
        n = min(state.slot_bytes, size - done)
        if state.rank == 0:
            copy(slot, x + done, n)
        _publish(state)
        if state.rank != 0:
            status = _await_rank(state, 0, state.sequence)
            if status != OK:
                break
            copy(x + done, slot, n)
        done += n
    return status


@_entry
def barrier(state: Any) -> Any:
    state = _state(state)
    status = _begin(state)
    if status != OK:
        return status
    status = _await_all(state, state.sequence)
    if status != OK:
        return status
    _publish(state)
    return _await_all(state, state.sequence)


@_entry
def abort(word: Any) -> Any:
    store_release(word, ABORTED)
    return OK


def warm_up() -> None:
    """Compile every entry function, or read it from Numba's cache: seconds, or milliseconds."""
    for function in _ENTRIES:
        function.compile((types.int64,) * function.__code__.co_argcount)
