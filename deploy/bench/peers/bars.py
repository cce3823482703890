"""What headwise holds itself to: ratios of two numbers of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deploy.bench.peers.contender import Decode, EngineName, Point, Prefill, Setup
from deploy.bench.peers.weights import QWEN_SIZED
from deploy.bench.suite.result import Cell, Table

Medians = Mapping[Point, float]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A measured number, or the ratio of two."""

    of: Point
    over: Point | None = None

    def value(self, medians: Medians) -> float | None:
        """None where it was not measured."""
        if self.of not in medians or (self.over is not None and self.over not in medians):
            return None
        return medians[self.of] / (1 if self.over is None else medians[self.over])


@dataclass(frozen=True, slots=True)
class Bar:
    """`ours` over `theirs` is to be `at_least` so much; both are better when larger."""

    what: str
    at_least: float
    ours: Quantity
    theirs: Quantity

    def row(self, medians: Medians) -> tuple[Cell, ...]:
        ours, theirs = self.ours.value(medians), self.theirs.value(medians)
        if ours is None or theirs is None:
            return (self.what, self.at_least, ours, theirs, None, "not measured")
        ratio = ours / theirs
        verdict = "pass" if ratio >= self.at_least else "miss"
        return (self.what, self.at_least, ours, theirs, ratio, verdict)


def table(bars: Sequence[Bar], medians: Medians) -> Table:
    """Every bar with both numbers."""
    return Table(
        title="Bars",
        columns=("what", "at least", "ours", "theirs", "ratio", "verdict"),
        rows=tuple(bar.row(medians) for bar in bars),
    )


@dataclass(frozen=True, slots=True)
class Scene:
    """What the bars are about: the model, and how each engine uses this machine's cores.

    `single` is one stream with an empty context, `many` the numbers of streams beyond one.
    """

    model: str
    ranks: int
    threads: int
    cores: int
    single: Decode
    many: tuple[Decode, ...]
    prefill: Prefill

    def ours(self, precision: str) -> Setup:
        return Setup("headwise", self.model, precision, self.ranks, self.threads)

    def peer(self, engine: EngineName, precision: str) -> Setup:
        """On all cores, in one process."""
        return Setup(engine, self.model, precision, 1, self.cores)

    def one_core(self, precision: str) -> Setup:
        """Headwise on a single core."""
        return Setup("headwise", self.model, precision, 1, 1)

    def limit(self) -> Point:
        """The memory roofline of all cores at 16 bits, which no engine can pass."""
        return Point(self.peer("roofline", "bfloat16"), self.single)


def bars(scene: Scene) -> tuple[Bar, ...]:
    return (
        *_decode_of_one(scene),
        *_decode_of_many(scene),
        Bar(
            f"{scene.prefill}, float16, against llama.cpp",
            1.2,
            Quantity(Point(scene.ours("float16"), scene.prefill)),
            Quantity(Point(scene.peer("llama.cpp", "float16"), scene.prefill)),
        ),
        *_tensor_parallel(scene),
        Bar(
            f"{scene.single}, bfloat16, share of the memory roofline",
            0.8,
            Quantity(Point(scene.ours("bfloat16"), scene.single)),
            Quantity(scene.limit()),
        ),
    )


def _decode_of_one(scene: Scene) -> Iterator[Bar]:
    against: tuple[tuple[EngineName, str, float], ...] = (
        ("llama.cpp", "bfloat16", 1.1),
        ("llama.cpp", "int8", 1.25),
        ("llama.cpp", "int4", 1.1),
        ("vLLM", "bfloat16", 3.0),
        ("vLLM", "float32", 2.0),
        ("transformers", "bfloat16", 3.0),
        ("transformers", "float32", 2.0),
    )
    for peer, precision, at_least in against:
        yield Bar(
            f"{scene.single}, {precision}, against {peer}",
            at_least,
            Quantity(Point(scene.ours(precision), scene.single)),
            Quantity(Point(scene.peer(peer, precision), scene.single)),
        )


def _decode_of_many(scene: Scene) -> Iterator[Bar]:
    for workload in scene.many:
        for precision in ("float32", "bfloat16", "int8", "int4"):
            yield Bar(
                f"{workload}, {precision}, against llama.cpp",
                1.3,
                Quantity(Point(scene.ours(precision), workload)),
                Quantity(Point(scene.peer("llama.cpp", precision), workload)),
            )
    widest = scene.many[-1]
    yield Bar(
        f"{widest}, float32, against vLLM",
        1.3,
        Quantity(Point(scene.ours("float32"), widest)),
        Quantity(Point(scene.peer("vLLM", "float32"), widest)),
    )


def _tensor_parallel(scene: Scene) -> Iterator[Bar]:
    yield Bar(
        f"TP={scene.ranks} over TP=1, one thread a rank, {scene.single}, bfloat16",
        1.8,
        Quantity(Point(scene.ours("bfloat16"), scene.single)),
        Quantity(Point(scene.one_core("bfloat16"), scene.single)),
    )
    for threads, how in ((1, "one thread a rank"), (scene.cores, "TP=1 on all cores")):

        def ratio(engine: EngineName, threads: int = threads) -> Quantity:
            return Quantity(
                Point(Setup(engine, QWEN_SIZED, "bfloat16", scene.ranks, 1), scene.single),
                Point(Setup(engine, QWEN_SIZED, "bfloat16", 1, threads), scene.single),
            )

        yield Bar(
            f"TP={scene.ranks} over TP=1, {QWEN_SIZED}, {how}, against vLLM's",
            2.5,
            ratio("headwise"),
            ratio("vLLM"),
        )
