"""Shards as Ray actors on two nodes: real processes, killed for real."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster import ClusterConfig, Engine, StartupError
from cluster.request import HealthState, Request, SamplingParams, Stopping
from tests.cluster.faults import kill_rank_1_in_mid_stream
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher

PROMPTS = [[1, 2, 3], [4], [5] * 30]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save(tiny_model("llama", num_attention_heads=9, num_key_value_heads=3), path)
    return path


def config(model_dir: Path, **options: object) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "model": str(model_dir),
            "tensor_parallel": 2,
            "kv_memory": 1 << 20,
            "step_timeout_s": 20,
            **options,
        }
    )


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[tuple[int, ...]]:
    one = config(model_dir, tensor_parallel=1)
    with Engine(one, launcher=ThreadLauncher(1)) as engine:
        return tokens(engine)


def tokens(engine: Engine) -> list[tuple[int, ...]]:
    generations = engine.generate(PROMPTS, max_tokens=16, temperature=0, progress=False)
    return [generation.token_ids for generation in generations]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """A Ray of two nodes with one CPU each, on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="hw-", dir="/tmp")  # short: it holds unix sockets
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**node, "include_dashboard": False, "temp_dir": folder},
    )
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_two_nodes_speak_over_sockets(
    two_nodes: None, model_dir: Path, expected: list[tuple[int, ...]]
) -> None:
    with Engine(config(model_dir, placement="STRICT_SPREAD")) as engine:
        assert engine.driver.collective == "gloo"
        assert tokens(engine) == expected


def test_what_no_node_can_hold_is_refused(two_nodes: None, model_dir: Path) -> None:
    with pytest.raises(StartupError, match="3 ranks need 3 CPUs and the Ray cluster has 2"):
        Engine(config(model_dir, tensor_parallel=3)).start()


def test_shared_memory_is_refused_across_nodes(two_nodes: None, model_dir: Path) -> None:
    spread = config(model_dir, placement="STRICT_SPREAD", collective="shared_memory")
    with pytest.raises(Exception, match="one host"):
        Engine(spread).start()


def test_a_killed_rank_ends_streams_with_its_name(
    two_nodes: None, model_dir: Path, expected: list[tuple[int, ...]]
) -> None:
    """Over gloo, whose survivor has no abort word: the broken connection tells it."""
    engine = Engine(config(model_dir, placement="STRICT_SPREAD", recoveries=0)).start()
    try:
        kill_rank_1_in_mid_stream(engine)
    finally:
        engine.stop()
    with Engine(config(model_dir, placement="STRICT_SPREAD")) as engine:
        assert tokens(engine) == expected  # nothing of the dead group is in the way


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("placement", ["STRICT_SPREAD", "PACK"])
def test_a_lost_actor_is_replaced_in_its_bundle(
    two_nodes: None, model_dir: Path, placement: str, number: signal.Signals
) -> None:
    """Also one that is stopped and still holds its CPU, of which the node has no other."""
    options = {"placement": placement, "step_timeout_s": 5, "recoveries": 1}
    with Engine(config(model_dir, **options)) as engine:
        sampling, stopping = SamplingParams(seed=1), Stopping(max_tokens=200, ignore_eos=True)
        request = Request("calm", (1, 2, 3), sampling, stopping)
        expected = [token for event in engine.driver.submit(request) for token in event.tokens]
        events = iter(engine.driver.submit(replace(request, id="lost")))
        tokens = list(next(events).tokens)
        before = [rank.pid for rank in engine.driver.ranks]
        os.kill(before[1], number)
        assert tokens + [token for event in events for token in event.tokens] == expected
        health, after = engine.driver.health(), [rank.pid for rank in engine.driver.ranks]
        assert (health.state, health.epoch) == (HealthState.READY, 2)
        assert before[0] == after[0]
        assert before[1] != after[1]
        assert not psutil.pid_exists(before[1])
