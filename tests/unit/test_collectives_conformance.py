"""What `Collective` promises, held against every transport that runs on a CPU."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from collectives_ranks import Processes, Threads, Workers

from shards.collectives.base import Collective
from shards.errors import CollectiveAborted, CollectiveError, CollectiveTimeout

Run = Callable[..., list[Any]]

# Shapes around a slot (4096 bytes) and around the parts that ranks deal among themselves.
SHAPES = [(), (1,), (0,), (3, 0), (7,), (576,), (2, 577), (1023,), (1025,), (13, 331), (40_003,)]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    assert not any(workers.close()), "a process that has left broken groups must still exit cleanly"


THREADS = ["threads", "shared_memory-threads"]
PROCESSES = ["shared_memory", "gloo"]


@pytest.fixture(params=[*THREADS, *PROCESSES])
def run(request: pytest.FixtureRequest, workers: Workers) -> Run:
    if request.param in THREADS:
        return Threads(request.param.removesuffix("-threads"))
    return Processes(request.param, workers)


# More processes than three would only crowd a small machine: threads cover the larger worlds.
every_world = pytest.mark.parametrize(
    ("run", "world"),
    [(name, world) for name in THREADS for world in (1, 2, 3, 4, 5)]
    + [(name, world) for name in PROCESSES for world in (1, 2, 3)],
    indirect=["run"],
)


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """This rank's tensor of magnitudes far apart, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    wide = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (wide * 10.0 ** torch.randint(-3, 3, shape, generator=generator)).to(dtype)


def bits(x: torch.Tensor) -> bytes:
    return x.reshape(-1).view(torch.int8).numpy().tobytes() if x.numel() else b""


def reduce_all(group: Collective) -> list[torch.Tensor]:
    sums = []
    for dtype in FLOATS:
        for shape in SHAPES:
            x = values(group.rank, shape, dtype)
            result = group.all_reduce(x)
            assert result is x
            sums.append(x)
    return sums


@every_world
def test_all_reduce_adds_in_rank_order_and_gives_all_the_same_bits(run: Run, world: int) -> None:
    results = run(reduce_all, world)

    cases = [(dtype, shape) for dtype in FLOATS for shape in SHAPES]
    for index, (dtype, shape) in enumerate(cases):
        wide = np.float64 if dtype == torch.float64 else np.float32
        total = np.zeros(shape, wide)
        for rank in range(world):
            total = total + values(rank, shape, dtype).to(torch.float64).numpy().astype(wide)
        expected = bits(torch.from_numpy(np.asarray(total)).to(dtype))
        for rank in range(world):
            assert bits(results[rank][index]) == expected, (dtype, shape, rank)


def reduce_unaligned(group: Collective) -> list[float]:
    x = torch.full((5001,), float(group.rank + 1), dtype=torch.bfloat16)
    group.all_reduce(x[1:-1])
    return [x[0].item(), x[1].item(), x[-2].item(), x[-1].item()]


@every_world
def test_all_reduce_of_a_view_touches_nothing_beside_it(run: Run, world: int) -> None:
    total = world * (world + 1) / 2
    for rank, result in enumerate(run(reduce_unaligned, world)):
        assert result == [rank + 1, total, total, rank + 1]


WIDTHS = [(5, 2, 0, 7, 1), (400, 1, 399, 3, 3), (0, 1, 1, 1, 1), (16, 16, 16, 16, 16)]


def pieces(rank: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    for widths in WIDTHS:
        for rows in [(1,), (3, 4), (0,), ()]:
            shape = (*rows, widths[rank])
            whole = torch.arange(int(np.prod(shape))).reshape(shape) + 100_000 * rank
            yield whole.to(torch.int64), list(widths)
            yield whole.to(torch.bfloat16), list(widths)
            yield whole % 2 == 0, list(widths)


def gather_all(group: Collective) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return [
        (group.all_gather(x, widths[: group.world]), group.gather(x, widths[: group.world]))
        for x, widths in pieces(group.rank)
    ]


@every_world
def test_gathers_join_uneven_widths(run: Run, world: int) -> None:
    results = run(gather_all, world)

    for index, parts in enumerate(zip(*(pieces(rank) for rank in range(world)), strict=True)):
        expected = torch.cat([x for x, _ in parts], -1)
        for rank in range(world):
            everywhere, on_first = results[rank][index]
            assert torch.equal(everywhere, expected)
            assert everywhere.dtype == expected.dtype
            if rank == 0:
                assert torch.equal(on_first, expected)
            else:
                assert on_first is None


def gather_transposed(group: Collective) -> torch.Tensor:
    return group.all_gather(torch.arange(6.0).reshape(2, 3).t() + group.rank, [2] * group.world)


def test_gather_takes_what_is_not_contiguous(run: Run) -> None:
    x = torch.arange(6.0).reshape(2, 3).t()
    for result in run(gather_transposed, 2):
        assert torch.equal(result, torch.cat([x, x + 1], -1))


def broadcast_all(group: Collective) -> list[torch.Tensor]:
    firsts = [
        torch.arange(3000),
        torch.tensor(2**62 + 1),
        torch.tensor([True, False, True]),
        torch.arange(9.0, dtype=torch.float16).reshape(3, 3),
        torch.empty(0),
    ]
    return [group.broadcast(x if group.rank == 0 else torch.zeros_like(x)) for x in firsts]


@every_world
def test_broadcast_gives_rank_0s_values(run: Run, world: int) -> None:
    results = run(broadcast_all, world)
    assert results[0][0].sum() == 3000 * 2999 // 2
    assert results[0][1] == 2**62 + 1
    for result in results:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def cross_barrier(group: Collective) -> tuple[int, int]:
    for _ in range(random.Random(group.rank).randrange(50)):
        os.sched_yield()
    arrived = time.monotonic_ns()
    group.barrier()
    return arrived, time.monotonic_ns()


@every_world
def test_nobody_leaves_a_barrier_before_all_have_come(run: Run, world: int) -> None:
    times = run(cross_barrier, world)
    assert max(arrived for arrived, _ in times) <= min(left for _, left in times)


def mix(group: Collective, calls: int) -> int:
    """Every kind of call in turn, ranks out of step; returns how many went wrong."""
    delays = random.Random(group.rank)
    world, wrong = group.world, 0
    for call in range(calls):
        for _ in range(delays.randrange(4)):
            os.sched_yield()
        if call % 7 == 3:
            x = torch.tensor([call if group.rank == 0 else -1])
            wrong += group.broadcast(x).item() != call
        elif call % 11 == 5:
            joined = group.gather(torch.tensor([group.rank + call]), [1] * world)
            expected = None if group.rank else [rank + call for rank in range(world)]
            wrong += (joined if joined is None else joined.tolist()) != expected
        else:
            x = torch.full((1 + call % 9,), float(group.rank + call))
            total = world * call + world * (world - 1) // 2
            wrong += group.all_reduce(x).tolist() != [total] * (1 + call % 9)
    return wrong


@every_world
def test_calls_back_to_back_never_mix(run: Run, world: int) -> None:
    slow = isinstance(run, Processes) and run.transport == "gloo"
    assert run(partial(mix, calls=60 if slow else 2000), world) == [0] * world


def last_stays_away(group: Collective) -> list[tuple[type, int | None]]:
    group.barrier()
    if group.rank == group.world - 1:
        return []
    errors = []
    for call in (group.barrier, lambda: group.all_reduce(torch.ones(3))):
        try:
            call()
        except CollectiveError as error:
            errors.append((type(error), error.rank))
    return errors


def test_a_rank_that_stays_away_is_named_and_the_group_is_spent(run: Run) -> None:
    first, second, _ = run(last_stays_away, 3, deadline_s=0.3)
    for errors in (first, second):
        assert errors[0] == (CollectiveTimeout, 2)
        assert len(errors) == 2  # the later call fails as well


def abort_instead(group: Collective) -> None:
    group.barrier()
    if group.rank == 0:
        group.abort()
        group.abort()
    group.barrier()


@every_world
def test_abort_by_one_rank_unblocks_all(run: Run, world: int) -> None:
    results = run(abort_instead, world)
    assert [type(result) for result in results] == [CollectiveAborted] * world


def abort_from_thread(group: Collective) -> None:
    group.barrier()
    if group.rank == group.world - 1:
        return
    helper = threading.Thread(target=group.abort)
    helper.start()
    try:
        group.barrier()
    finally:
        helper.join()


def test_abort_from_another_thread_unblocks_its_own_rank(run: Run) -> None:
    results = run(abort_from_thread, 2)
    assert type(results[0]) is CollectiveAborted


def close_twice(group: Collective) -> list[type]:
    group.barrier()
    group.close()
    group.close()
    group.abort()
    try:
        group.all_reduce(torch.ones(2))
    except CollectiveError as error:
        return [type(error)]
    return []


def test_a_closed_group_refuses_calls(run: Run) -> None:
    assert run(close_twice, 2) == [[CollectiveAborted]] * 2


def misuse(group: Collective) -> list[str]:
    group.barrier()
    faults = []
    calls: tuple[Callable[[], object], ...] = (
        lambda: group.all_reduce(torch.ones(4, 4).t()[1:]),
        lambda: group.all_reduce(torch.ones(4, dtype=torch.int32)),
        lambda: group.all_gather(torch.ones(2, 3), [3]),
        lambda: group.all_gather(torch.ones(2, 3), [4, 4]),
        lambda: group.gather(torch.tensor(1.0), [1, 1]),
        lambda: group.broadcast(torch.ones(4, 4).t()),
        lambda: group.broadcast(torch.ones(4, device="meta")),
    )
    for call in calls:
        try:
            call()
        except ValueError as error:
            faults.append(str(error))
    group.barrier()
    return faults


def test_a_misuse_is_refused_before_anything_is_sent(run: Run) -> None:
    for faults in run(misuse, 2):
        assert len(faults) == 7
        assert "not contiguous" in faults[0]
        assert "int32" in faults[1]
        assert "1 widths for 2 ranks" in faults[2]
        assert "widths[" in faults[3]
        assert "meta" in faults[6]


def last_is_killed(group: Collective) -> None:
    group.barrier()
    if group.rank == group.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.all_reduce(torch.ones(100))


def one_sum(group: Collective) -> float:
    return group.all_reduce(torch.ones(1)).item()


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_survivors_of_a_killed_rank_name_it_and_form_a_new_group(
    workers: Workers, transport: str
) -> None:
    run = Processes(transport, workers)
    first, second, last = run(last_is_killed, 3, deadline_s=2.0)
    assert last == "dead"
    assert isinstance(first, CollectiveError)
    assert isinstance(second, CollectiveError)
    assert (first.rank, second.rank) == (2, 2)
    assert run(one_sum, 2) == [2.0, 2.0]  # the same two processes


def wait_for_absent(group: Collective) -> None:
    if group.rank != group.world - 1:
        group.barrier()


def test_the_driver_aborts_a_segment(workers: Workers) -> None:
    results = Processes("shared_memory", workers)(wait_for_absent, 3, abort=True)
    assert [type(result) for result in results[:2]] == [CollectiveAborted] * 2
