"""`headwise bench roofline`: how fast decoding could be on this machine, and how fast it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cluster.blueprint import draw_up
from deploy.bench.suite.engines import EngineOptions, running
from deploy.bench.suite.environment import Environment
from deploy.bench.suite.limit import Stored, decode_limit, rates_of
from deploy.bench.suite.probe import Probe
from deploy.bench.suite.result import Measurement, Plot, Result, Series, Table, measurements_of
from shards.cost.host import HostProfile
from shards.models.spec import ModelSpec
from shards.quantization.choice import Quantization

_STORED: tuple[tuple[str, Quantization], ...] = (
    ("float32", "none"),
    ("bfloat16", "none"),
    ("bfloat16", "int8"),
    ("bfloat16", "int4"),
)


def measure_roofline(
    options: EngineOptions,
    *,
    batches: Sequence[int],
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    seed: int,
) -> Result:
    """The machine's rates by number of cores, the limits they set for `options.model`, and the
    share that a run of `options` reaches at each batch."""
    from shards.cost.measurement import measure_host

    environment = Environment.here()
    blueprint = draw_up(options.config())
    host = measure_host()
    spec = blueprint.source.spec
    rates = rates_of(host, environment.cores)
    context = prompt_tokens + tokens // 2  # on average over the run
    measured: defaultdict[int, list[float]] = defaultdict(list)
    with running(options.but(max_sequences=max(batches))) as engine:
        probe = Probe(engine.driver, seed)
        probe.decode(max(batches), prompt_tokens, 2)  # warm: kernels, pages, allocators
        for _ in range(rounds):
            for batch in batches:
                measured[batch].append(probe.decode(batch, prompt_tokens, tokens).tokens_per_s)
    stored = Stored.of(blueprint)
    reached = {batch: float(np.median(values)) for batch, values in measured.items()}
    limits = {batch: decode_limit(spec, stored, rates, batch, context) for batch in batches}
    return Result(
        benchmark="roofline",
        environment=environment,
        settings={**options.model_dump(exclude_none=True), "prompt_tokens": prompt_tokens}
        | {"tokens": tokens, "rounds": rounds, "seed": seed},
        measurements=(
            *(
                Measurement(
                    of={"cores": m.cores}, quantity="read", unit="bytes/s", values=(m.bandwidth,)
                )
                for m in host.measured
            ),
            *(
                Measurement(
                    of={"cores": m.cores, "arithmetic": kind},
                    quantity="matrix products",
                    unit="operations/s",
                    values=(rate,),
                )
                for m in host.measured
                for kind, rate in m.operations.items()
            ),
            *measurements_of(
                {(batch,): values for batch, values in measured.items()},
                ["batch"],
                "decode",
                "tokens/s",
            ),
        ),
        tables=(
            _machine_table(host),
            _limits_table(spec, host, context),
            Table(
                title=f"Reached with {stored}, tensor parallel {options.tensor_parallel}",
                columns=("batch", "tokens/s", "limit", "share of limit", "bound by"),
                rows=tuple(
                    (
                        batch,
                        reached[batch],
                        batch / limit.step_s,
                        reached[batch] * limit.step_s / batch,
                        "memory" if limit.memory_s >= limit.compute_s else "arithmetic",
                    )
                    for batch, limit in limits.items()
                ),
            ),
        ),
        plots=(
            Plot(
                title=f"Decode of {blueprint.source.name} and its roofline",
                x_label="sequences decoding side by side",
                y_label="tokens/s",
                log_x=True,
                log_y=True,
                series=(
                    Series(label="measured", x=tuple(reached), y=tuple(reached.values())),
                    Series(
                        label=f"limit of {rates.cores} cores",
                        x=tuple(limits),
                        y=tuple(batch / limit.step_s for batch, limit in limits.items()),
                        dashed=True,
                    ),
                ),
            ),
        ),
    )


def _machine_table(host: HostProfile) -> Table:
    kinds = tuple(host.measured[0].operations)
    return Table(
        title="The machine",
        columns=("cores", "read GB/s", *(f"{kind} G operations/s" for kind in kinds)),
        rows=tuple(
            (m.cores, m.bandwidth / 1e9, *(m.operations[kind] / 1e9 for kind in kinds))
            for m in host.measured
        ),
    )


def _limits_table(spec: ModelSpec, host: HostProfile, context: int) -> Table:
    return Table(
        title=f"Limit of one sequence, tokens/s, {context} tokens in the cache",
        columns=("weights", *(f"{m.cores} cores" for m in host.measured)),
        rows=tuple(
            (
                str(stored),
                *(1 / decode_limit(spec, stored, m, 1, context).step_s for m in host.measured),
            )
            for stored in (Stored.by(spec, *each) for each in _STORED)
        ),
    )
