"""Who is at fault when ranks stop, and how often that may be."""

from __future__ import annotations

from cluster.diagnosis import RankState, find_cause
from cluster.recovery import WINDOW_S, Recoveries, Suspicion
from shards.contract import Failure, Hello, Loaded


def states(count: int) -> list[RankState]:
    return [
        RankState(Hello(rank, "", "host", 10 + rank), Loaded(rank, 1, 1, 0.1, 1))
        for rank in range(count)
    ]


def waited_for(rank: int, suspect: int, aborted: bool = False) -> Failure:
    return Failure(rank, "late", suspect=suspect, user_error=True, aborted=aborted, stays=True)


def test_who_vanished_comes_before_who_complains() -> None:
    ranks = states(3)
    ranks[0].failure = waited_for(0, 2)
    ranks[1].failure = Failure(1, "no disk")
    ranks[2].gone = True
    lost = find_cause(ranks, {2: "out of memory"}, silent=[])
    assert (str(lost), lost.rank) == ("rank 2 (pid 12, host) died (out of memory)", 2)
    assert lost.replace == (1, 2)
    assert not lost.final


def test_who_died_after_a_time_out_of_its_own_died() -> None:
    ranks = states(2)
    ranks[1].failure, ranks[1].gone = waited_for(1, 0), True
    lost = find_cause(ranks, {}, silent=[])
    assert (lost.rank, lost.replace) == (1, (1,))


def test_who_is_silent_is_replaced_and_who_was_slow_is_not() -> None:
    ranks = states(3)
    ranks[0].failure = waited_for(0, 2)
    ranks[1].failure = waited_for(1, -1, aborted=True)
    assert find_cause(ranks, {}, silent=[2]).replace == (2,)
    slow = find_cause(ranks, {}, silent=[])
    assert (slow.rank, slow.replace) == (2, ())
    assert "rank 2 (pid 12, host) did not answer" in str(slow)


def test_where_nobody_is_blamed_the_silent_are_replaced() -> None:
    assert find_cause(states(3), {}, silent=[0, 2]).replace == (0, 2)
    ranks = states(3)
    ranks[0].failure = waited_for(0, -1)
    assert find_cause(ranks, {}, silent=[1]).replace == (1,)


def test_what_a_successor_could_not_do_either_is_final() -> None:
    ranks = states(2)
    ranks[1].failure = Failure(1, "no room for the cache", user_error=True)
    assert find_cause(ranks, {}, silent=[]).final
    ranks[1] = RankState(failure=Failure(1, "a bug in the loader"))
    assert find_cause(ranks, {}, silent=[]).final
    ranks[1] = RankState()
    assert not find_cause(ranks, {1: "killed while it loaded"}, silent=[]).final


def test_recoveries_come_back_with_time() -> None:
    recoveries = Recoveries(2)
    assert [recoveries.take(now) for now in (0, 1, 2)] == [True, True, False]
    assert recoveries.take(WINDOW_S)
    assert not recoveries.take(WINDOW_S + 0.5)
    assert not Recoveries(0).take(0)


def test_a_request_is_suspected_until_it_gets_a_token() -> None:
    suspicion = Suspicion()
    assert not suspicion.confirm(0)
    assert suspicion.confirm(1)
    innocent = Suspicion()
    for now in (0, WINDOW_S, 2 * WINDOW_S):
        assert not innocent.confirm(now)
        innocent.clear()
    assert not innocent.confirm(2 * WINDOW_S + 1)
    innocent.clear()
    assert innocent.confirm(2 * WINDOW_S + 2)
