"""`headwise bench latency`: time to first token by prompt length; between tokens by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from deploy.bench.suite.engines import EngineOptions, running
from deploy.bench.suite.environment import Environment
from deploy.bench.suite.probe import Probe
from deploy.bench.suite.result import Plot, Result, Series, Table, measurements_of


def measure_latency(
    options: EngineOptions,
    *,
    prompts: Sequence[int],
    batches: Sequence[int],
    tokens: int,
    rounds: int,
    seed: int,
) -> Result:
    """TTFT of one prompt of each length in `prompts`, alone; ITL over `tokens` tokens, by the
    number of sequences that decode side by side. Seconds."""
    environment = Environment.here()
    ttft: defaultdict[int, list[float]] = defaultdict(list)
    itl: defaultdict[int, list[float]] = defaultdict(list)
    rates: defaultdict[int, list[float]] = defaultdict(list)
    with running(options.but(max_sequences=max(batches))) as engine:
        probe = Probe(engine.driver, seed)
        probe.decode(max(batches), prompts[0], 2)  # warm: kernels, pages, allocators
        for _ in range(rounds):
            for length in prompts:
                ttft[length].append(probe.prefill_s(length))
            for streams in batches:
                found = probe.decode(streams, prompts[0], tokens)
                itl[streams].extend(found.itl_s)
                rates[streams].append(found.tokens_per_s)
    return Result(
        benchmark="latency",
        environment=environment,
        settings={**options.model_dump(exclude_none=True), "tokens": tokens, "seed": seed}
        | {"rounds": rounds},
        measurements=(
            *measurements_of({(key,): v for key, v in ttft.items()}, ["prompt"], "ttft", "s"),
            *measurements_of({(key,): v for key, v in itl.items()}, ["batch"], "itl", "s"),
            *measurements_of(
                {(key,): v for key, v in rates.items()}, ["batch"], "decode", "tokens/s"
            ),
        ),
        tables=(
            Table(
                title="Time to first token, one prompt alone",
                columns=("prompt tokens", "p50 ms", "max ms", "prefill tokens/s"),
                rows=tuple(
                    (n, _ms(v, 50), _ms(v, 100), n / float(np.median(v))) for n, v in ttft.items()
                ),
            ),
            Table(
                title=f"Between tokens, prompts of {prompts[0]} tokens",
                columns=("batch", "p50 ms", "p90 ms", "p99 ms", "tokens/s, all", "tokens/s each"),
                rows=tuple(
                    (n, _ms(v, 50), _ms(v, 90), _ms(v, 99), rate, rate / n)
                    for n, v in itl.items()
                    for rate in [float(np.median(rates[n]))]
                ),
            ),
        ),
        plots=(
            Plot(
                title="Inter-token latency by batch",
                x_label="sequences decoding side by side",
                y_label="ms",
                log_x=True,
                series=tuple(
                    Series(label=f"p{p}", x=tuple(itl), y=tuple(_ms(v, p) for v in itl.values()))
                    for p in (50, 90, 99)
                ),
            ),
        ),
    )


def _ms(seconds: Sequence[float], percentile: int) -> float:
    return float(np.percentile(seconds, percentile)) * 1e3
