"""`headwise bench peers`: engines side by side, on the same weights, prompts and lengths.

Engines of one precision are started together and compute one at a time, in rounds, so that a noisy
minute disturbs all alike. Starting and warming up do not count; medians are compared.
"""

from __future__ import annotations

import os
import statistics

from deploy.bench.peers import bars
from deploy.bench.peers.roster import Roster
from deploy.bench.peers.rounds import Samples, Say, measure
from deploy.bench.peers.settings import Settings
from deploy.bench.peers.tables import engine_tables, phase_table, plots
from deploy.bench.suite.engines import shared_ray
from deploy.bench.suite.environment import Environment
from deploy.bench.suite.limit import Stored, decode_limit, rates_of
from deploy.bench.suite.result import Measurement, Result
from shards.models.source import load_spec


def compare(settings: Settings, say: Say) -> Result:
    """Measure everything that `settings` ask for; `say` hears what is going on."""
    environment = Environment.here()
    roster, samples = Roster(settings, environment.cores), Samples()
    scene = roster.scene
    ranks_up = settings.ranks + 2  # of the largest group of engines that are up together
    with shared_ray(max(os.cpu_count() or 1, ranks_up)):
        for entries in roster.groups():
            measure(entries, settings.rounds, settings.seed, samples, say)
    medians = {point: statistics.median(values) for point, values in samples.values.items()}
    say("measuring the machine")
    medians[scene.limit()] = _limit(settings, scene)
    return Result(
        benchmark="peers",
        environment=environment,
        settings={
            "model": scene.model,
            "tensor_parallel": settings.ranks,
            "prompt_tokens": settings.prompt_tokens,
            "tokens": settings.tokens,
            "rounds": settings.rounds,
            "seed": settings.seed,
            **roster.versions,
        },
        measurements=tuple(
            Measurement(
                of={
                    "engine": point.setup.engine,
                    "model": point.setup.model,
                    "precision": point.setup.precision,
                    "ranks": point.setup.ranks,
                    "threads": point.setup.threads,
                },
                quantity=str(point.workload),
                unit="tokens/s",
                values=tuple(values),
            )
            for point, values in samples.values.items()
        ),
        tables=(
            bars.table(bars.bars(scene), medians),
            *engine_tables(scene, medians),
            phase_table(scene, roster.engines),
        ),
        plots=tuple(plots(scene, medians)),
        notes=tuple(samples.notes),
    )


def _limit(settings: Settings, scene: bars.Scene) -> float:
    """Tokens per second of one stream in bfloat16, by the memory of all cores."""
    from shards.cost.measurement import measure_host

    host = measure_host()
    context = 1 + settings.tokens // 2  # on average over the run
    spec, rates = load_spec(str(settings.model)), rates_of(host, scene.cores)
    stored = Stored.by(spec, "bfloat16", "none")
    return 1 / decode_limit(spec, stored, rates, 1, context).step_s
