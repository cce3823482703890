"""`headwise bench throughput`: what an engine gets through when there is always work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from deploy.bench.suite.engines import EngineOptions, running
from deploy.bench.suite.environment import Environment
from deploy.bench.suite.probe import Batch, Probe
from deploy.bench.suite.result import Plot, Result, Series, Table, measurements_of


def measure_throughput(
    options: EngineOptions,
    *,
    batches: Sequence[int],
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    seed: int,
) -> Result:
    """Tokens per second, prefill included, of requests that are all sent at once: as many as
    `batches` says, each with `prompt_tokens` in and `tokens` out."""
    environment = Environment.here()
    found: defaultdict[int, list[Batch]] = defaultdict(list)
    with running(options.but(max_sequences=max(batches))) as engine:
        probe = Probe(engine.driver, seed)
        probe.batch(max(batches), prompt_tokens, 2)  # warm: kernels, pages, allocators
        for _ in range(rounds):
            for requests in batches:
                found[requests].append(probe.batch(requests, prompt_tokens, tokens))
    seconds = {n: [batch.seconds for batch in batches] for n, batches in found.items()}
    typical = {n: float(np.median(values)) for n, values in seconds.items()}
    out = {n: n * tokens / each for n, each in typical.items()}
    return Result(
        benchmark="throughput",
        environment=environment,
        settings={**options.model_dump(exclude_none=True), "prompt_tokens": prompt_tokens}
        | {"tokens": tokens, "rounds": rounds, "seed": seed},
        measurements=measurements_of(
            {(n,): values for n, values in seconds.items()}, ["requests"], "run", "s"
        ),
        tables=(
            Table(
                title=f"Requests of {prompt_tokens} tokens in and {tokens} out, sent at once",
                columns=("requests", "output tokens/s", "input + output tokens/s", "requests/s"),
                rows=tuple(
                    (n, out[n], n * (prompt_tokens + tokens) / each, n / each)
                    for n, each in typical.items()
                ),
            ),
        ),
        plots=(
            Plot(
                title="Throughput, prefill included",
                x_label="requests sent at once",
                y_label="output tokens/s",
                log_x=True,
                series=(Series(label="headwise", x=tuple(out), y=tuple(out.values())),),
            ),
        ),
    )
