"""This host's processor as a device: shares of its cores, and where its measurement is kept."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from shards.cost.errors import CannotPredict
from shards.cost.host import (
    CoreRates,
    HostProfile,
    host_name,
    profile_path,
    store_host,
    stored_host,
)
from shards.cost.prediction import predict
from shards.layout import make_layout
from tests.unit.cost_specs import llama


def profile(*measured: tuple[int, float, float], name: str = "a processor") -> HostProfile:
    """From (cores, GB/s, Gflop/s)."""
    return HostProfile(
        name=name,
        memory_bytes=24 << 30,
        measured=tuple(
            CoreRates(
                cores,
                bandwidth * 1e9,
                {"float32": gflops * 1e9, "bfloat16": gflops * 1e9, "int8": 4 * gflops * 1e9},
            )
            for cores, bandwidth, gflops in measured
        ),
        bandwidth_share=1,
        operations_share=1,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_ranks_share_what_the_cores_attain_together() -> None:
    host = profile((1, 20, 60), (2, 30, 120), (4, 40, 200))
    assert host.rank(1).bandwidth == 40e9
    assert host.rank(2).bandwidth == 20e9
    assert host.rank(4).bandwidth == 10e9
    assert host.rank(2).operations["int8"] == 400e9
    # Three ranks of one core each leave a core idle: between what 2 and 4 attain.
    assert host.rank(3).bandwidth == pytest.approx(35e9 / 3)
    assert host.rank(8).bandwidth == 5e9, "ranks beyond the cores take turns"
    assert host.memory(4) == 6 << 30


def test_ranks_on_hosts_of_their_own_share_nothing() -> None:
    host = profile((1, 20, 60), (2, 30, 120))
    apart = HostProfile(host.name, host.memory_bytes, host.measured, shared=False)
    assert apart.rank(2) == apart.rank(1)
    assert apart.memory(2) == host.memory_bytes
    assert (host.devices(2), apart.devices(2)) == (1, 2)


def test_fewer_cores() -> None:
    host = profile((1, 20, 60), (2, 30, 120), (4, 40, 200))
    assert host.on_cores(1).rank(1).bandwidth == 20e9
    assert host.on_cores(3).rank(1).bandwidth == pytest.approx(35e9)
    assert host.on_cores(4) == host
    with pytest.raises(CannotPredict, match="cores 5: a processor was measured with up to 4"):
        host.on_cores(5)


def test_two_ranks_on_two_cores_beat_one_core_and_not_the_limit() -> None:
    """SmolLM2's shape on a processor of 18.5 GB/s a core and 30 for two: 269 MB in 16 bits."""
    spec = llama(576, 30, tied=True)
    host = profile((1, 18.5, 64), (2, 30, 127))
    one_core = predict(
        spec, make_layout(spec, 1), host.on_cores(1), dtype="bfloat16", prompt=16, context=16
    )
    two = predict(spec, make_layout(spec, 2), host, dtype="bfloat16", prompt=16, context=16)
    assert 60 < one_core.tokens_per_second < 71
    assert 1.4 < two.tokens_per_second / one_core.tokens_per_second < 30 / 18.5
    assert two.decode.bound == "memory"
    assert two.tokens_per_second_per_device == two.tokens_per_second


def test_quantised_weights_use_integer_products() -> None:
    spec = llama(576, 30, tied=True)
    host = profile((1, 1e6, 64), (2, 1e6, 127))
    floats, integers = (
        predict(spec, make_layout(spec, 2), host, dtype="bfloat16", quantization=kind).prefill
        for kind in ("none", "int8")
    )
    assert floats.bound == integers.bound == "compute"
    assert floats.compute_s > 2 * integers.compute_s


def test_a_profile_is_kept() -> None:
    measured = profile((1, 20, 60), name=host_name())
    store_host(measured)
    assert stored_host() == measured
    assert host_name().endswith(f"{len(os.sched_getaffinity(0))} cores")


def test_no_profile() -> None:
    with pytest.raises(CannotPredict, match=r"has not been measured; run .* --measure once"):
        stored_host()


def test_a_profile_of_another_processor_is_refused() -> None:
    store_host(profile((1, 20, 60), name="another, 96 cores"))
    with pytest.raises(CannotPredict, match="was measured on another, 96 cores, and this is"):
        stored_host()


def test_a_broken_profile_is_refused() -> None:
    store_host(profile((1, 20, 60)))
    profile_path().write_text('{"name": 7}')
    with pytest.raises(CannotPredict, match=r"cannot be read \(.*: measure anew with --measure"):
        stored_host()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CannotPredict, match="cannot be written"):
        store_host(profile((1, 20, 60)))


def test_measuring_this_host() -> None:
    from shards.cost.measurement import measure_host

    before, running = os.sched_getaffinity(0), set(threading.enumerate())
    measured = measure_host(rounds=1)
    assert measured.name == host_name()
    assert measured.cores == len(before)
    assert measured.measured[0].cores == 1
    for rates in measured.measured:
        assert rates.bandwidth > 1e8
        # Whatever is slower than widening to float32 is not what would be used.
        assert set(rates.operations) == {"float32", "bfloat16", "float16", "int8"}
        assert all(rate > 1e8 for rate in rates.operations.values())
    assert os.sched_getaffinity(0) == before, "the caller's cores are as they were"
    assert set(threading.enumerate()) <= running
