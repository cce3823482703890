"""The benchmarks of engines in this process: what is measured, the arithmetic, the files."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.driver import Driver
from cluster.engine import Engine
from deploy import cli
from deploy.bench.suite.collectives import Sweep, measure_collectives
from deploy.bench.suite.engines import EngineOptions
from deploy.bench.suite.environment import Environment
from deploy.bench.suite.errors import BenchmarkError
from deploy.bench.suite.limit import Stored, decode_limit, rates_of
from deploy.bench.suite.output import write
from deploy.bench.suite.probe import Probe
from deploy.bench.suite.result import Measurement, Plot, Result, Series, Table, measurements_of
from deploy.bench.suite.scaling import sizes_to
from shards.cost.host import CoreRates, HostProfile
from shards.models.source import load_spec
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher

ENVIRONMENT = Environment(
    started_at=datetime(2026, 11, 22, tzinfo=UTC),
    processor="abacus",
    vector_extensions=("avx2",),
    cores=2,
    memory_bytes=8 << 30,
    gpus=(),
    system="Linux",
    python="3.11",
    versions={"headwise": "1"},
    commit="abc",
    load=0.0,
)
RESULT = Result(
    benchmark="example",
    environment=ENVIRONMENT,
    settings={"seed": 7},
    measurements=(Measurement(of={"batch": 1}, quantity="itl", unit="s", values=(3.0, 1.0, 2.0)),),
    tables=(Table(title="T", columns=("a", "b"), rows=((1, 1234.5), (None, 0.01234))),),
    plots=(Plot(title="P", x_label="x", y_label="y", series=(Series(label="s", x=(), y=()),)),),
    notes=("something was left out",),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llama")
    save(tiny_model("llama"), path)
    return path


@pytest.fixture(scope="module")
def driver(model: Path) -> Iterator[Driver]:
    """Two ranks on threads; at most four sequences, in a cache of 64 blocks of 8 tokens."""
    options = EngineOptions(model=str(model), tensor_parallel=2, max_sequences=4)
    blueprint = Engine(options.config()).driver.blueprint
    config = blueprint.config.model_copy(
        update={"block_size": 8, "kv_memory": 8 * 64 * blueprint.footprints[0].kv_per_token}
    )
    with Engine(config, launcher=ThreadLauncher(2)) as engine:
        yield engine.driver


# The probe.


def test_decode_counts_every_stream_and_nothing_before_the_last_ones_first_token(
    driver: Driver,
) -> None:
    found = Probe(driver).decode(3, prompt_tokens=9, tokens=20)

    assert found.streams == 3
    assert found.tokens >= 20
    assert len(found.itl_s) == found.tokens
    assert math.isclose(sum(found.itl_s), found.window_s, rel_tol=0.01)
    assert len(found.ttft_s) == 3
    assert list(found.ttft_s) == sorted(found.ttft_s)
    assert found.tokens_per_s == pytest.approx(3 * found.tokens / found.window_s)
    assert 0 < found.all_reduce_share < 1
    assert driver.load().kv_blocks_used == 0


def test_prefill_and_batch(driver: Driver) -> None:
    probe, before = Probe(driver), driver.load()
    assert probe.prefill_s(33) > 0
    found = probe.batch(3, prompt_tokens=5, tokens=4)
    after = driver.load()

    assert (found.input_tokens, found.output_tokens) == (15, 12)
    assert after.prompt_tokens - before.prompt_tokens == 33 + 15
    assert after.cached_tokens == before.cached_tokens
    assert after.generated_tokens - before.generated_tokens == 1 + 12


def test_more_streams_than_the_engine_runs_are_refused(driver: Driver) -> None:
    with pytest.raises(BenchmarkError, match="5 streams, and the engine runs max_sequences=4"):
        Probe(driver).decode(5, 4, 4)


def test_a_cache_too_small_for_all_streams_is_refused(driver: Driver) -> None:
    with pytest.raises(BenchmarkError, match="--kv-memory"):
        Probe(driver).decode(4, 150, 4)
    assert driver.load().kv_blocks_used == 0


# Options.


def test_a_bad_option_is_named() -> None:
    with pytest.raises(BenchmarkError, match=r"kv_memory='lots'.*dtype='float8'|dtype.*kv_memory"):
        EngineOptions(model="m", dtype="float8", kv_memory="lots").config()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("latency", "-m", "m", "--batches", "1,x"), "--batches=1,x: give numbers from 1"),
        (("throughput", "-m", "m", "--requests", "0"), "--requests=0: give numbers from 1"),
        (("scaling", "-m", "m", "--sizes", ""), "--sizes=: give numbers from 1"),
        (("scaling", "-m", "m", "--sizes", "2", "--no-plot"), "--sizes must hold 1"),
        (("collectives", "--transports", "pigeon", "--no-plot"), "use shared_memory or gloo"),
        (("roofline", "-m", "/nowhere", "--no-plot"), "/nowhere"),
        (("peers", "-m", "/nowhere", "--no-plot"), "--model /nowhere: no such file"),
        (("peers",), "--model is missing"),
        (("peers", "-m", "m", "--streams", "2,4", "--no-plot"), "begin with 1"),
        (("peers", "-m", "m", "--precisions", "int3", "--no-plot"), "--precisions int3: use some"),
    ],
)
def test_options_that_cannot_be_meant_are_one_sentence(
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["headwise", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()

    assert (ended.value.code, out) == (1, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_sizes_go_as_far_as_the_devices() -> None:
    assert [sizes_to(devices) for devices in (1, 2, 6, 8)] == [
        (1,),
        (1, 2),
        (1, 2, 4, 6),
        (1, 2, 4, 8),
    ]


# The roofline.

HOST = HostProfile(
    "abacus",
    1 << 30,
    tuple(
        CoreRates(cores, 1e9 * cores, dict.fromkeys(("float32", "bfloat16", "int8"), 1e12))  # type: ignore[arg-type]
        for cores in (1, 2)
    ),
)


def test_one_stream_is_bound_by_reading_every_weight_once(model: Path) -> None:
    spec = load_spec(str(model))
    stored = Stored.by(spec, "float32", "none")
    limit = decode_limit(spec, stored, HOST.measured[0], 1, 1)
    # 2 layers of q, k, v, out, 3 x FFN and 2 norms; the last norm; the output layer; keys and
    # values of one token. The embedding is looked up.
    layer = 72 * 72 * 2 + 24 * 72 * 2 + 3 * 101 * 72 + 2 * 72
    floats = 2 * layer + 72 + 131 * 72 + 2 * 2 * 24

    assert limit.memory_s == pytest.approx(4 * floats / 1e9)
    assert limit.step_s == limit.memory_s > limit.compute_s


def test_many_streams_are_bound_by_arithmetic(model: Path) -> None:
    spec = load_spec(str(model))
    stored = Stored.by(spec, "float32", "none")
    slow = CoreRates(1, 1e9, {"float32": 1e9})
    one, many = (decode_limit(spec, stored, slow, batch, 1) for batch in (1, 64))

    assert many.compute_s == pytest.approx(64 * one.compute_s)
    assert many.step_s == many.compute_s


def test_fewer_bits_are_fewer_bytes(tmp_path: Path) -> None:
    save(tiny_model("llama", hidden_size=288, intermediate_size=96), tmp_path)
    spec = load_spec(str(tmp_path))
    stored = [Stored.by(spec, "bfloat16", kind) for kind in ("none", "int8", "int4")]
    limits = [decode_limit(spec, each, HOST.measured[0], 1, 1).memory_s for each in stored]

    assert limits == sorted(limits, reverse=True)
    assert len(set(limits)) == 3
    assert [each.precision.quantization for each in stored] == ["none", "int8", "int4"]


def test_the_rates_are_those_of_the_cores_used() -> None:
    assert [rates_of(HOST, cores).cores for cores in (1, 2, 3)] == [1, 2, 2]


# Results.


def test_the_files_hold_everything(tmp_path: Path) -> None:
    paths = write(RESULT, tmp_path / "new", plots=False)

    assert [path.name for path in paths] == ["example.json", "example.md"]
    assert Result.model_validate_json(paths[0].read_text()) == RESULT
    text = paths[1].read_text()
    for words in ("abacus", "headwise 1 at abc", "seed 7", "| 1 | 1,234 |", "| - | 0.0123 |"):
        assert words in text
    assert "something was left out" in text


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(BenchmarkError, match="--output /proc/nowhere cannot be written"):
        write(RESULT, Path("/proc/nowhere"), plots=False)


def test_samples_keep_their_order_and_have_a_median() -> None:
    [found] = measurements_of({(2, "gloo"): [3.0, 1.0, 2.0]}, ["ranks", "over"], "all-reduce", "s")

    assert found.of == {"ranks": 2, "over": "gloo"}
    assert found.values == (3.0, 1.0, 2.0)
    assert found.median == 2.0


def test_no_matplotlib_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["headwise", "bench", "collectives"])
    with pytest.raises(SystemExit):
        cli.main()

    assert "headwise-cluster[bench]" in capsys.readouterr().err


def test_a_plot_is_an_svg_with_its_labels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    line = Series(label="measured", x=(1, 2, 4), y=(1, 2, 3))
    plot = Plot(title="P", x_label="ranks", y_label="speed-up", log_x=True, series=(line,))
    [*_, path] = write(RESULT.model_copy(update={"plots": (plot,)}), tmp_path)

    assert path.name == "example.svg"
    text = path.read_text()
    assert all(word in text for word in ("<svg", "measured", "ranks", "speed-up"))


def test_here_is_described() -> None:
    here = Environment.here()

    assert here.cores >= 1
    assert here.versions["torch"]
    assert json.loads(here.model_dump_json())["processor"]


def test_collectives_measure_every_size() -> None:
    sweep = Sweep(2, ("gloo",), calls=3, rounds=1, sizes=(4, 4096))
    found = measure_collectives(sweep)

    [table] = found.tables
    assert [row[0] for row in table.rows] == [4, 4096]
    assert all(isinstance(cell, float) and cell > 0 for row in table.rows for cell in row[1:])
    assert {m.of["transport"] for m in found.measurements} == {"gloo", "memory copy"}
