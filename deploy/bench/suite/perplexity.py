"""`headwise bench perplexity`: what each precision costs in accuracy, on one text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.blueprint import draw_up
from cluster.engine import Engine
from deploy.bench.suite.engines import EngineOptions, running, shared_ray
from deploy.bench.suite.environment import Environment
from deploy.bench.suite.errors import BenchmarkError
from deploy.bench.suite.result import Measurement, Result, Table

WINDOW = 512


@dataclass(frozen=True, slots=True)
class Precision:
    """A row of the table: `ClusterConfig`'s dtype and quantization."""

    name: str
    dtype: str
    quantization: str


PRECISIONS = (
    Precision("float32", "float32", "none"),
    Precision("bfloat16", "bfloat16", "none"),
    Precision("float16", "float16", "none"),
    Precision("int8", "auto", "int8"),
    Precision("int4", "auto", "int4"),
    Precision("as in the checkpoint", "auto", "auto"),
)


def perplexity(engine: Engine, text: str, *, window: int = WINDOW) -> float:
    """exp of the mean negative log likelihood of `text`'s tokens, from the second on.

    Windows of `window` tokens begin half a window apart, and each scores the tokens that the one
    before has not: beyond the first, every token is seen behind half a window or more. Raises
    `BenchmarkError` where there is no tokenizer, or no second token.
    """
    codec = engine.driver.codec
    if codec is None:
        raise BenchmarkError("perplexity needs a tokenizer, and the model comes without one")
    tokens = codec.encode(text)
    if len(tokens) < 2:
        raise BenchmarkError(f"perplexity needs 2 tokens, and the text has {len(tokens)}")
    window = min(window, engine.model.context - 1)
    windows = _windows(tokens, window)
    found = engine.generate(windows, max_tokens=1, temperature=0, prompt_logprobs=0, progress=False)
    scored: list[float] = []
    for nth, generation in enumerate(found):
        logprobs = generation.prompt_logprobs or ()
        fresh = logprobs[window // 2 + window % 2 :] if nth else logprobs
        scored.extend(token.logprob for token in fresh if token is not None)
    return math.exp(-sum(scored) / len(scored))


def measure_perplexity(
    options: EngineOptions, text: str, precisions: Sequence[Precision] = PRECISIONS
) -> Result:
    """`text` under each of `precisions`, and against the first of them; `options` say the rest."""
    environment = Environment.here()
    found: dict[str, float] = {}
    weights: dict[str, float] = {}
    with shared_ray(options.tensor_parallel):
        for precision in precisions:
            under = options.but(dtype=precision.dtype, quantization=precision.quantization)
            footprints = draw_up(under.config()).footprints
            weights[precision.name] = sum(rank.weights for rank in footprints) / 2**20
            with running(under) as engine:
                found[precision.name] = perplexity(engine, text)
    first = found[precisions[0].name]
    return Result(
        benchmark="perplexity",
        environment=environment,
        settings={**options.model_dump(exclude_none=True), "characters": len(text)},
        measurements=tuple(
            Measurement(of={"precision": name}, quantity="perplexity", unit="", values=(value,))
            for name, value in found.items()
        ),
        tables=(
            Table(
                title=f"Perplexity by precision, against {precisions[0].name}",
                columns=("weights", "MiB", "perplexity", "change"),
                rows=tuple(
                    (name, weights[name], f"{value:.3f}", f"{value / first - 1:+.2%}")
                    for name, value in found.items()
                ),
            ),
        ),
        plots=(),
    )


def _windows(tokens: Sequence[int], window: int) -> list[list[int]]:
    """Half a window apart, until the last token is in one."""
    stride = window // 2
    stops = range(window, len(tokens) + stride, stride)
    return [list(tokens[stop - window : stop]) for stop in stops] or [list(tokens)]
