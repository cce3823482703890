"""Headwise beside other engines: order, what is left out, the bars, and how peers are driven."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.bench.peers import bars, worker
from deploy.bench.peers.bars import Bar, Quantity, Scene
from deploy.bench.peers.contender import (
    Contender,
    Decode,
    EngineName,
    Point,
    Prefill,
    Setup,
    Workload,
)
from deploy.bench.peers.llama_cpp import PROGRAMS, LlamaCpp, LlamaCppContender
from deploy.bench.peers.rounds import Entry, Samples, measure
from deploy.bench.peers.tables import engine_tables, plots
from deploy.bench.peers.weights import Weights
from deploy.bench.peers.worker import WorkerContender
from deploy.bench.suite.errors import BenchmarkError
from tests.models import save, tiny_model

ONE, EIGHT, PREFILL = Decode(1, 1, 64), Decode(8, 16, 64), Prefill(512)
SCENE = Scene("m", ranks=2, threads=1, cores=2, single=ONE, many=(EIGHT,), prefill=PREFILL)


def setup(engine: EngineName = "headwise") -> Setup:
    return Setup(engine, "m", "float32", 1, 2)


# Rounds.


class Scripted:
    """Answers 1, 2, 3 .. and notes who was asked for what, in `log`."""

    def __init__(self, name: str, log: list[tuple[str, Workload, int]], unable: Workload | None):
        self._name, self._log, self._unable, self._count = name, log, unable, 0.0

    def tokens_per_s(self, workload: Workload, seed: int) -> float:
        if isinstance(workload, type(self._unable)):
            raise BenchmarkError("too long for me")
        self._log.append((self._name, workload, seed))
        self._count += 1
        return self._count


def entry(
    engine: EngineName,
    log: list[tuple[str, Workload, int]],
    unable: Workload | None = None,
    fails: bool = False,
) -> Entry:
    def start(_: ExitStack) -> Contender:
        if fails:
            raise BenchmarkError("is not installed")
        return Scripted(engine, log, unable)

    return Entry(setup(engine), (ONE, PREFILL), start)


def silent(_: str) -> None:
    """For what nobody listens to."""


def test_rounds_are_interleaved_and_begin_with_another_engine_each() -> None:
    log: list[tuple[str, Workload, int]] = []
    samples = Samples()
    measure([entry("headwise", log), entry("vLLM", log)], 2, seed=10, samples=samples, say=silent)

    short = Decode(1, 1, 4)
    warm = [("headwise", short), ("headwise", PREFILL), ("vLLM", short), ("vLLM", PREFILL)]
    first = [("headwise", ONE), ("headwise", PREFILL), ("vLLM", ONE), ("vLLM", PREFILL)]
    second = [*first[1:], first[0]]
    assert [(name, workload) for name, workload, _ in log] == warm + first + second
    assert [seed for *_, seed in log] == [10] * 4 + [11] * 4 + [12] * 4
    assert samples.values[Point(setup("headwise"), ONE)] == [3.0, 6.0]
    assert samples.notes == []


def test_what_cannot_run_is_noted_and_left_out() -> None:
    log: list[tuple[str, Workload, int]] = []
    samples = Samples()
    entries = [entry("vLLM", log, fails=True), entry("transformers", log, unable=PREFILL)]
    measure(entries, 1, seed=0, samples=samples, say=silent)

    assert list(samples.values) == [Point(setup("transformers"), ONE)]
    assert [note.partition("left out: ")[2] for note in samples.notes] == [
        "is not installed",
        "too long for me",
    ]


class Dying(Scripted):
    """Ends in the middle of the second round."""

    def tokens_per_s(self, workload: Workload, seed: int) -> float:
        if seed == 2:
            raise BenchmarkError("killed")
        return super().tokens_per_s(workload, seed)


def test_who_dies_in_a_round_is_left_out_whole_and_the_others_go_on() -> None:
    samples = Samples()
    dying = Entry(setup("vLLM"), (ONE,), lambda _: Dying("vLLM", [], None))
    measure([dying, entry("transformers", [])], 3, seed=0, samples=samples, say=silent)

    transformers = setup("transformers")
    assert list(samples.values) == [Point(transformers, ONE), Point(transformers, PREFILL)]
    assert {len(values) for values in samples.values.values()} == {3}
    assert samples.notes == ["vLLM, 2 threads, decode x1, left out in round 2: killed"]


# Bars.


@pytest.mark.parametrize(("theirs", "verdict"), [(10.0, "pass"), (20.0, "miss")])
def test_a_bar_is_passed_from_its_ratio_on(theirs: float, verdict: str) -> None:
    ours, peer = Point(setup(), ONE), Point(setup("llama.cpp"), ONE)
    row = Bar("decode", 1.5, Quantity(ours), Quantity(peer)).row({ours: 15.0, peer: theirs})

    assert row == ("decode", 1.5, 15.0, theirs, 15 / theirs, verdict)


def test_a_bar_without_a_number_is_not_measured() -> None:
    ours, peer = Point(setup(), ONE), Point(setup("llama.cpp"), ONE)
    row = Bar("decode", 1.5, Quantity(ours), Quantity(peer)).row({ours: 15.0})

    assert row == ("decode", 1.5, 15.0, None, None, "not measured")


def test_a_ratio_of_ratios() -> None:
    engines: tuple[EngineName, ...] = ("headwise", "vLLM")
    points = [Point(Setup(e, "q", "bfloat16", ranks, 1), ONE) for e in engines for ranks in (2, 1)]
    bar = Bar("TP", 2.5, Quantity(points[0], points[1]), Quantity(points[2], points[3]))
    row = bar.row(dict(zip(points, (18.0, 10.0, 6.0, 8.0), strict=True)))

    assert row[2:] == (1.8, 0.75, pytest.approx(2.4), "miss")


def test_every_bar_asks_for_points_that_can_be_measured() -> None:
    every = bars.bars(SCENE)
    points = [p for bar in every for q in (bar.ours, bar.theirs) for p in (q.of, q.over) if p]
    rows = bars.table(every, dict.fromkeys(points, 1.0)).rows

    assert {bar.at_least for bar in every} == {0.8, 1.1, 1.2, 1.25, 1.3, 1.8, 2.0, 2.5, 3.0}
    assert len({row[0] for row in rows}) == len(rows)
    assert {row[-1] for row in rows if isinstance(row[1], float) and row[1] > 1} == {"miss"}


def test_tables_and_plots_show_each_engine_and_our_ratio() -> None:
    ours, peer = SCENE.ours("float32"), SCENE.peer("vLLM", "float32")
    medians = {Point(ours, ONE): 30.0, Point(peer, ONE): 10.0, Point(peer, EIGHT): 40.0}
    [table] = engine_tables(SCENE, medians)
    [plot] = plots(SCENE, medians)

    assert table.columns == ("tokens/s", "decode x1", "ours is x", "decode x8", "ours is x")
    assert table.rows == (
        ("headwise TP=2, 1 thread", 30.0, 1.0, None, None),
        ("vLLM, 2 threads", 10.0, 3.0, 40.0, None),
    )
    assert [(line.label, line.x, line.y) for line in plot.series] == [
        ("vLLM, 2 threads", (1.0, 8.0), (10.0, 40.0))
    ]


# llama.cpp, by programs that answer as its own do.

_BENCH = """import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
speed = 100.0 * int(options["-n"]) + int(options["-p"]) + int(options.get("-d", 0)) / 1000
print(json.dumps([{"samples_ts": [speed], "threads": options["-t"]}]))
"""
_BATCHED = """import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert int(options["-c"]) == int(options["-npl"]) * (int(options["-npp"]) + int(options["-ntg"]))
print("main: something for people")
print(json.dumps({"speed_tg": 7.5}))
"""
_QUANTIZE = """import pathlib, sys
_, _, source, target, kind = sys.argv
pathlib.Path(target).write_text(pathlib.Path(source).read_text() + " as " + kind)
"""


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., LlamaCpp]:
    def make(bench: str = _BENCH, batched: str = _BATCHED, quantize: str = _QUANTIZE) -> LlamaCpp:
        folder = tmp_path / "llama.cpp"
        folder.mkdir()
        for name, text in zip(PROGRAMS, (bench, batched, quantize), strict=True):
            path = folder / name
            path.write_text(f"#!{sys.executable}\n{text}")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return LlamaCpp(folder)

    return make


def test_llama_cpp_is_asked_for_pure_decode_and_pure_prefill(
    install: Callable[..., LlamaCpp],
) -> None:
    contender = LlamaCppContender(install(), Path("m.gguf"), 2)

    assert contender.tokens_per_s(Decode(1, 1, 64), 0) == 6400
    assert contender.tokens_per_s(Decode(1, 128, 64), 0) == 6400.128
    assert contender.tokens_per_s(Prefill(512), 0) == 512
    assert contender.tokens_per_s(Decode(8, 16, 64), 0) == 7.5


def test_a_program_that_fails_is_quoted(install: Callable[..., LlamaCpp]) -> None:
    fails = "import sys\nsys.exit('no such tensor')"
    contender = LlamaCppContender(install(bench=fails), Path("m.gguf"), 2)
    with pytest.raises(BenchmarkError, match=r"llama-bench -m m.gguf .* 1: no such tensor"):
        contender.tokens_per_s(PREFILL, 0)


def test_programs_that_are_not_there_can_be_built(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"has no llama-bench: .*--build-llama-cpp"):
        LlamaCpp(tmp_path)


def test_every_precision_is_made_of_float32_and_once(
    install: Callable[..., LlamaCpp], tmp_path: Path
) -> None:
    model = tmp_path / "m.gguf"
    model.write_text("m")
    programs, weights = install(), Weights(model, tmp_path / "cache")
    path = weights.gguf("int4", programs)

    assert path.name == "m.Q4_0.gguf"
    assert path.read_text() == "m as F32 as Q4_0"
    path.write_text("kept")
    assert weights.gguf("int4", programs).read_text() == "kept"
    model.write_text("another")
    assert Weights(model, tmp_path / "cache").gguf("int4", programs).read_text() != "kept"


def test_llama_cpp_reads_no_folder(install: Callable[..., LlamaCpp], tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="reads GGUF files alone"):
        Weights(tmp_path, tmp_path).gguf("float32", install())


# Workers.

_ECHO = """import json, sys
print(json.dumps({"echo": "1"}), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    if question["kind"] == "prefill":
        sys.exit("out of beads")
    print(json.dumps({"tokens_per_s": question["streams"] + question["seed"]}), flush=True)
"""


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    path = tmp_path / "echo.py"
    path.write_text(_ECHO)
    return path


def _soon(condition: Callable[[], bool]) -> bool:
    """Signals are delivered in the kernel's own time."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def started(script: Path, options: dict[str, Any], **environment: str) -> WorkerContender:
    return WorkerContender("echo", Path(sys.executable), script, options, environment)


def test_a_worker_answers_and_takes_no_core_in_between(echo: Path) -> None:
    before = set(psutil.Process().children())
    with started(echo, {}) as contender:
        [process] = set(psutil.Process().children()) - before
        assert contender.versions == {"echo": "1"}
        assert contender.tokens_per_s(EIGHT, 4) == 12
        assert _soon(lambda: process.status() == psutil.STATUS_STOPPED)
    assert not process.is_running()


def test_a_worker_that_ends_is_quoted_and_leaves_its_log(
    echo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(logs))
    with started(echo, {}) as contender, pytest.raises(BenchmarkError, match="out of beads"):
        contender.tokens_per_s(PREFILL, 0)
    [log] = logs.glob("*/log")
    assert log.read_text().strip() == "out of beads"


def test_a_worker_that_ends_in_order_leaves_no_log(
    echo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(logs))
    with started(echo, {}):
        assert list(logs.iterdir())
    assert not list(logs.iterdir())


_FORGETFUL = """import json, multiprocessing.resource_tracker, multiprocessing.shared_memory, sys
memory = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
multiprocessing.resource_tracker.unregister(memory._name, "shared_memory")
print(json.dumps({"name": memory.name}), flush=True)
sys.stdin.read()
"""


def test_a_worker_leaves_no_shared_memory(tmp_path: Path) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text(_FORGETFUL)
    with started(script, {}) as contender:
        path = Path("/dev/shm", contender.versions["name"])
        assert path.exists()
    assert not path.exists()


def test_a_worker_that_does_not_start_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(BenchmarkError, match="No such file"):
        started(tmp_path / "nowhere.py", {})


_VLLM = """import types
__version__ = "0"
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert (temperature, ignore_eos) == (0, True)
        self.max_tokens = max_tokens
class TokensPrompt(dict): pass
class Engine:
    model_config = types.SimpleNamespace(get_vocab_size=lambda: 50)
    engine_core = types.SimpleNamespace(shutdown=lambda: None)
    def __init__(self): self.requests, self.waiting = {}, []
    def add_request(self, name, prompt, parameters):
        assert all(0 <= token < 50 for token in prompt["prompt_token_ids"])
        self.waiting.append((name, parameters.max_tokens))
    def abort_request(self, names):
        for name in names: self.requests.pop(name, None)
    def has_unfinished_requests(self): return bool(self.requests or self.waiting)
    def step(self):
        if self.waiting:  # one prefill a step, as others decode
            name, most = self.waiting.pop(0)
            self.requests[name] = [0, most]
        found = []
        for name, progress in list(self.requests.items()):
            progress[0] += 1
            tokens = types.SimpleNamespace(token_ids=[0] * progress[0])
            found.append(types.SimpleNamespace(request_id=name, outputs=[tokens]))
            if progress[0] == progress[1]: del self.requests[name]
        return found
class LLM:
    def __init__(self, **options):
        assert options["tensor_parallel_size"] == 2 and not options["enable_prefix_caching"]
        print("something for people")
        self.llm_engine = Engine()
"""


def test_vllm_is_stepped_by_hand(tmp_path: Path) -> None:
    """By a package that has of vLLM what the script uses."""
    (tmp_path / "vllm.py").write_text(_VLLM)
    (tmp_path / "torch.py").write_text("__version__ = '0'")
    script = Path(worker.__file__).with_name("vllm_worker.py")
    options = {"folder": "m", "dtype": "float32", "ranks": 2, "max_sequences": 8}
    with started(script, options, PYTHONPATH=str(tmp_path)) as contender:
        assert contender.versions == {"vLLM": "0", "torch": "0"}
        assert contender.tokens_per_s(EIGHT, 0) > 0
        assert contender.tokens_per_s(PREFILL, 0) > 0
        assert contender.tokens_per_s(ONE, 0) > 0


def test_transformers_generates(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    script = Path(worker.__file__).with_name("transformers_worker.py")
    options = {"folder": str(tmp_path), "dtype": "float32", "threads": 1}
    with started(script, options, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1")) as found:
        assert found.tokens_per_s(Decode(2, 3, 4), 0) > 0
        assert found.tokens_per_s(Prefill(16), 0) > 0
