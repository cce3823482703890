"""Where requests go, and what becomes of them when their replica refuses or dies."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cluster.errors import InvalidRequest, Overloaded, Unavailable, Violation
from cluster.request import FinishReason, HealthState, Request, SamplingParams
from deploy.fleet.affinity import CHUNK_TOKENS
from deploy.fleet.router import Member, Router
from tests.unit.fakes import FakeGenerator
from tests.unit.fleet_replicas import request

SYSTEM = tuple(range(CHUNK_TOKENS))


def member(name: str, generator: FakeGenerator, *, retiring: bool = False) -> Member:
    return Member(name, generator, sequences=8, is_retiring=lambda: retiring)


def routed(*names: str) -> tuple[Router, dict[str, FakeGenerator]]:
    generators = {name: FakeGenerator() for name in names}
    members = [member(name, generator) for name, generator in generators.items()]
    router = Router(members[0], random.Random(0))
    for each in members[1:]:
        router.add(each)
    return router, generators


def busy(generator: FakeGenerator, *, running: int) -> None:
    load = replace(generator.load(), running=running)
    generator.load = lambda: load  # type: ignore[method-assign]


def owners(generators: dict[str, FakeGenerator]) -> dict[str, str]:
    """The replica that got each request last."""
    return {asked.id: name for name, one in generators.items() for asked in one.requests}


async def tokens_of(router: Router, asked: Request) -> list[int]:
    return [token async for event in router.submit(asked) for token in event.tokens]


def test_the_less_busy_one_gets_the_request() -> None:
    router, generators = routed("a", "b")
    busy(generators["a"], running=5)
    for number in range(4):
        router.submit(request(str(number)))
    assert set(owners(generators).values()) == {"b"}


def test_what_was_just_sent_counts_before_a_replica_says_so() -> None:
    router, generators = routed("a", "b")
    for generator in generators.values():
        busy(generator, running=0)
    for number in range(8):
        router.submit(request(str(number)))
    assert [len(generator.requests) for generator in generators.values()] == [4, 4]


async def test_a_prompt_returns_to_where_its_beginning_is_cached() -> None:
    router, generators = routed("a", "b", "c")
    # A conversation for each salt, which grows.
    for turn in range(1, 4):
        for salt in "xyz":
            prompt = SYSTEM * turn
            await tokens_of(router, request(f"{salt}{turn}", prompt=prompt, cache_salt=salt))
    owner = owners(generators)
    for salt in "xyz":
        assert len({owner[f"{salt}{turn}"] for turn in range(1, 4)}) == 1


def test_edges_that_know_nothing_yet_name_the_same_replica() -> None:
    answers = set()
    for seed in range(5):
        router, generators = routed("a", "b", "c")
        router = Router(router.members[0], random.Random(seed))
        for name in "bc":
            router.add(member(name, generators[name]))
        router.submit(request("r", prompt=SYSTEM))
        answers.add(owners(generators)["r"])
    assert len(answers) == 1


async def test_a_favourite_that_is_much_busier_is_given_up() -> None:
    router, generators = routed("a", "b")
    await tokens_of(router, request("first", prompt=SYSTEM))
    favourite = owners(generators)["first"]
    busy(generators[favourite], running=12)
    await tokens_of(router, request("second", prompt=SYSTEM))
    assert owners(generators)["second"] != favourite


async def test_requests_that_share_no_blocks_have_no_favourite() -> None:
    router, generators = routed("a", "b")
    await tokens_of(router, request("first", prompt=SYSTEM, cache=False))
    busy(generators[owners(generators)["first"]], running=1)
    await tokens_of(router, request("second", prompt=SYSTEM, cache=False))
    assert owners(generators)["second"] != owners(generators)["first"]


@pytest.mark.parametrize("refusal", [Overloaded("full", 1.0), Unavailable("starting")])
async def test_another_one_is_asked_where_one_refuses(refusal: Exception) -> None:
    router, generators = routed("a", "b")
    generators["a"].refusal = refusal
    busy(generators["b"], running=5)
    assert bytes(await tokens_of(router, request())) == b"abcde"


def test_where_all_refuse_their_reason_is_told() -> None:
    router, generators = routed("a", "b")
    for generator in generators.values():
        generator.refusal = Overloaded("full", 2.5)
    with pytest.raises(Overloaded, match="full"):
        router.submit(request())


def test_a_fault_of_the_request_is_nobody_elses() -> None:
    router, generators = routed("a", "b")
    for generator in generators.values():
        generator.refusal = InvalidRequest(Violation("prompt", "too long"))
    with pytest.raises(InvalidRequest):
        router.submit(request())


def test_replicas_that_retire_or_do_not_compute_get_nothing_new() -> None:
    generators = {name: FakeGenerator() for name in "abc"}
    router = Router(member("a", generators["a"], retiring=True))
    router.add(member("b", generators["b"]))
    router.add(member("c", generators["c"]))
    generators["b"].set_health(HealthState.NOT_READY, "rank 0 died")
    for number in range(4):
        router.submit(request(str(number)))
    assert set(owners(generators).values()) == {"c"}
    router.remove("c")
    with pytest.raises(Unavailable):
        router.submit(request())


def test_replicas_that_replace_a_rank_get_only_what_nobody_else_takes() -> None:
    router, generators = routed("a", "b")
    generators["a"].set_health(HealthState.DEGRADED, "rank 0 died")
    for number in range(4):
        router.submit(request(str(number)))
    assert set(owners(generators).values()) == {"b"}
    generators["b"].set_health(HealthState.DEGRADED, "rank 1 died")
    router.submit(request("stalls"))
    assert owners(generators)["stalls"] in {"a", "b"}


async def test_a_stream_goes_on_at_the_next_token_with_the_same_seed() -> None:
    router, generators = routed("a", "b")
    asked = request(max_tokens=6, sampling=SamplingParams(prompt_logprobs=0))
    stream = router.submit(asked)
    first = owners(generators)["r"]
    second = {"a": "b", "b": "a"}[first]
    events = []
    async for event in stream:
        events.append(event)
        if len(events) == 2:
            generators[first].set_health(HealthState.NOT_READY, "rank 1 died")

    assert bytes(token for event in events for token in event.tokens) == b"abcdef"
    assert events[-1].finish is FinishReason.LENGTH
    assert [event.prompt_logprobs is not None for event in events] == [True] + [False] * 5
    (resumed,) = generators[second].requests
    assert resumed.generated == tuple(b"ab")
    assert resumed.stopping == asked.stopping


async def test_several_samples_begin_anew_only_while_nothing_was_delivered() -> None:
    router, generators = routed("a", "b")
    stream = router.submit(request(n=2, max_tokens=3))
    generators[owners(generators)["r"]].set_health(HealthState.NOT_READY, "rank 1 died")
    assert len([event async for event in stream]) == 6

    for generator in generators.values():
        generator.set_health(HealthState.READY)
    stream = router.submit(request("again", n=2, max_tokens=3))
    owner = generators[owners(generators)["again"]]

    async def read_until_it_dies() -> None:
        async for _ in stream:
            owner.set_health(HealthState.NOT_READY, "rank 1 died")

    with pytest.raises(Unavailable, match="rank 1 died"):
        await read_until_it_dies()


async def test_a_closed_stream_lets_go_and_no_longer_counts() -> None:
    router, generators = routed("a")
    generators["a"].pause()
    stream = router.submit(request())
    assert router.members[0].streams == 1
    stream.close()
    assert generators["a"].closed == ["r"]
    assert router.members[0].streams == 0


async def test_abort_finds_the_owner() -> None:
    router, generators = routed("a", "b")
    for generator in generators.values():
        generator.pause()
    router.submit(request())
    assert await router.abort("r")
    assert not await router.abort("another")


def test_the_whole_is_as_well_as_its_healthiest_replica() -> None:
    router, generators = routed("a", "b")
    generators["a"].set_health(HealthState.NOT_READY, "rank 0 died")
    health = router.health()
    assert health.state is HealthState.READY
    assert {rank.replica: rank.state for rank in health.ranks} == {
        "a": HealthState.NOT_READY,
        "b": HealthState.READY,
    }
    generators["b"].set_health(HealthState.NOT_READY, "rank 1 died")
    assert router.health().state is HealthState.NOT_READY
    router.remove("a")
    router.remove("b")
    assert router.health().cause.startswith("no replica of fake")


def test_load_is_summed() -> None:
    router, generators = routed("a", "b")
    one = generators["a"].load()
    assert router.load().kv_blocks == 2 * one.kv_blocks
    assert router.load().block_size == one.block_size
    for generator in generators.values():
        loaded = replace(one, waiting_tokens=700)
        generator.load = lambda loaded=loaded: loaded  # type: ignore[method-assign,misc]
    assert router.load().waiting_tokens == 1400


def test_a_routed_stream_is_for_coroutines() -> None:
    router, _ = routed("a")
    with pytest.raises(TypeError, match="async for"):
        iter(router.submit(request()))
