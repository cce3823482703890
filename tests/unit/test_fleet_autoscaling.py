"""How many replicas the policy wants, given what they say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from deploy.args import AppArgs
from deploy.autoscaling import KV_USE, ONGOING, Autoscaling, Policy

TARGETS = {"target_ongoing_requests": 10, "target_kv_utilization": 0.5}


def wish(now: int, ongoing: list[float], kv: list[float]) -> int:
    metrics = {ONGOING: dict(enumerate(ongoing)), KV_USE: dict(enumerate(kv))}
    context = SimpleNamespace(target_num_replicas=now, aggregated_metrics=metrics)
    wanted, state = Policy(**TARGETS)(context)
    assert state == {}
    return wanted


@pytest.mark.parametrize(
    ("now", "ongoing", "kv", "wanted"),
    [
        (1, [10], [0.1], 1),
        (1, [11], [0.1], 2),  # requests alone ask for more
        (1, [1], [0.9], 2),  # so do long contexts
        (1, [35], [0.9], 4),  # whichever asks for most
        (3, [4, 4, 4], [0.2, 0.2, 0.2], 2),
        (3, [0, 0, 0], [0, 0, 0], 1),
        (2, [], [], 2),  # nobody has said anything yet
    ],
)
def test_both_signals_count(now: int, ongoing: list[float], kv: list[float], wanted: int) -> None:
    assert wish(now, ongoing, kv) == wanted


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Serve's own
def test_serve_takes_the_config_and_finds_the_policy() -> None:
    from ray.serve.config import AutoscalingConfig

    config = AutoscalingConfig(**Autoscaling(min_replicas=2, max_replicas=4, **TARGETS).for_serve())
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    context = SimpleNamespace(target_num_replicas=2, aggregated_metrics={ONGOING: {"a": 31}})

    assert (config.min_replicas, config.max_replicas) == (2, 4)
    assert policy(context)[0] == 4


def test_the_bounds_are_in_order() -> None:
    with pytest.raises(ValidationError, match="min_replicas=3"):
        Autoscaling(min_replicas=3, max_replicas=2)


def test_a_number_of_replicas_and_autoscaling_exclude_each_other() -> None:
    autoscaling = {"max_replicas": 2}
    assert AppArgs.model_validate({"model": "m", "autoscaling": autoscaling}).autoscaling
    with pytest.raises(ValidationError, match="replicas=2 and autoscaling"):
        AppArgs.model_validate({"model": "m", "replicas": 2, "autoscaling": autoscaling})


def test_a_fleet_drains_long_enough_for_connections_to_move_on() -> None:
    server = AppArgs.model_validate({"model": "m"}).in_fleet().server
    assert server.max_connection_age_s is not None
    assert 2 * server.max_connection_age_s <= server.drain_timeout_s
    given = AppArgs.model_validate(
        {"model": "m", "drain_timeout_s": 5, "max_connection_age_s": 4}
    ).in_fleet()
    assert (given.server.drain_timeout_s, given.server.max_connection_age_s) == (5, 4)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"revision": "main"}, False),
        ({"quantization": "int8"}, False),
        ({"served_name": "other"}, False),
        ({"tensor_parallel": 2}, False),
        ({"max_sequences": 4}, True),
        ({"replicas": 3, "grpc_port": 0}, True),
    ],
)
def test_a_version_is_what_the_answers_depend_on(change: dict[str, object], same: bool) -> None:
    one = AppArgs.model_validate({"model": "m"})
    other = AppArgs.model_validate({"model": "m", **change})
    assert (one.version == other.version) is same
