"""`headwise bench scaling`: what more ranks bring, and what the cost model says they should.

Strong scaling keeps the batch: efficiency is the speed-up over one rank, over the ranks. Weak
scaling lets it grow with the ranks: efficiency is the tokens per second and rank, over one rank's.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from cluster.blueprint import draw_up
from deploy.bench.suite.engines import EngineOptions, running, shared_ray
from deploy.bench.suite.environment import Environment
from deploy.bench.suite.errors import BenchmarkError
from deploy.bench.suite.limit import Stored
from deploy.bench.suite.probe import Decode, Probe
from deploy.bench.suite.result import Plot, Result, Series, Table, measurements_of
from shards.cost.device import Device, accelerator
from shards.cost.host import HostProfile
from shards.cost.prediction import CostModel


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to use the machine: `threads` of each of `ranks` ranks."""

    ranks: int
    threads: int

    def __str__(self) -> str:
        return f"TP={self.ranks}" + (f", {self.threads} threads" if self.threads > 1 else "")


ONE = Arm(1, 1)


def sizes_to(devices: int) -> tuple[int, ...]:
    """1, 2, 4, .. as far as `devices` go, and all of them."""
    powers = [1 << k for k in range(devices.bit_length()) if 1 << k < devices]
    return (*powers, devices)


def measure_scaling(
    options: EngineOptions,
    *,
    sizes: Sequence[int] | None,
    batches: Sequence[int],
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    seed: int,
    device: str = "cpu",
) -> Result:
    """Decode steps at every tensor-parallel size in `sizes` (by default as far as this machine's
    devices go), one thread a rank, and on CPUs at size 1 with all cores as threads too.

    `device` is what predictions are for: "cpu" as measured here, or an accelerator's name. Every
    round starts every engine anew, so that a noisy minute disturbs all sizes alike.
    """
    environment = Environment.here()
    on_cpu = options.device in (None, "cpu")
    devices = environment.cores if on_cpu else len(environment.gpus)
    if devices == 0:
        raise BenchmarkError("device=cuda: this machine has no GPU; use --device cpu")
    arms = [Arm(size, 1) for size in sizes or sizes_to(devices)]
    if ONE not in arms:
        raise BenchmarkError("--sizes must hold 1: everything is compared with one rank")
    if on_cpu and environment.cores > 1:
        arms.append(Arm(1, environment.cores))
    found: defaultdict[tuple[Arm, int], list[Decode]] = defaultdict(list)
    with shared_ray(max([os.cpu_count() or 1, *(arm.ranks for arm in arms)])):
        for number in range(rounds):
            for arm in arms:
                wanted = sorted({*batches, *(batch * arm.ranks for batch in batches)})
                given = options.but(
                    tensor_parallel=arm.ranks,
                    threads_per_rank=arm.threads if on_cpu else None,
                    max_sequences=max(wanted),
                )
                with running(given) as engine:
                    probe = Probe(engine.driver, seed + number)
                    probe.decode(max(wanted), prompt_tokens, 2)  # warm: kernels, pages
                    for batch in wanted:
                        found[arm, batch].append(probe.decode(batch, prompt_tokens, tokens))
    context = prompt_tokens + tokens // 2  # on average over the run
    predicted = _predictions(options, arms, {batch for _, batch in found}, context, device)
    step_s = {key: float(np.median([d.step_s for d in runs])) for key, runs in found.items()}
    share = {
        key: float(np.median([d.all_reduce_share for d in runs])) for key, runs in found.items()
    }
    rows = []
    for batch in batches:
        for arm in arms:
            speedup = step_s[ONE, batch] / step_s[arm, batch]
            of_prediction = predicted[arm, batch]
            rows.append(
                (
                    *(batch, str(arm), step_s[arm, batch] * 1e3, speedup),
                    speedup / (arm.ranks * arm.threads),
                    share[arm, batch],
                    of_prediction * 1e3,
                    of_prediction / step_s[arm, batch] - 1,
                )
            )
    weak_rows = []
    for batch in batches:
        for arm in arms:
            if arm.threads == 1:
                each = batch / step_s[arm, batch * arm.ranks]
                one = batch / step_s[ONE, batch]
                weak_rows.append((batch, str(arm), each * arm.ranks, each, each / one))
    return Result(
        benchmark="scaling",
        environment=environment,
        settings=options.model_dump(exclude_none=True, exclude={"tensor_parallel"})
        | {"prompt_tokens": prompt_tokens}
        | {"tokens": tokens, "rounds": rounds, "seed": seed, "predicted_for": device},
        measurements=measurements_of(
            {
                (arm.ranks, arm.threads, batch): [d.step_s for d in runs]
                for (arm, batch), runs in found.items()
            },
            ["ranks", "threads", "batch"],
            "decode step",
            "s",
        ),
        tables=(
            Table(
                title="Strong scaling: the same batch on more ranks",
                columns=(
                    *("batch", "ranks", "step ms", "speed-up", "parallel efficiency"),
                    *("all-reduce share", "predicted ms", "prediction's error"),
                ),
                rows=tuple(rows),
            ),
            Table(
                title="Weak scaling: the batch grows with the ranks",
                columns=(
                    *("batch per rank", "ranks", "tokens/s", "tokens/s per rank"),
                    "parallel efficiency",
                ),
                rows=tuple(weak_rows),
            ),
        ),
        plots=(_plot(batches, arms, step_s, predicted),),
    )


def _predictions(
    options: EngineOptions, arms: Sequence[Arm], batches: set[int], context: int, device: str
) -> dict[tuple[Arm, int], float]:
    """Seconds of a decode step, by the cost model."""
    host = None
    if device == "cpu":
        from shards.cost.measurement import measure_host

        host = measure_host()
    found = {}
    for arm in arms:
        blueprint = draw_up(options.but(tensor_parallel=arm.ranks).config())
        model = CostModel(
            blueprint.source.spec,
            blueprint.layout,
            accelerator(device) if host is None else _limited(host, arm.ranks * arm.threads),
            None,
            Stored.of(blueprint).precision,
            blueprint.config.max_step_tokens,
        )
        for batch in batches:
            found[arm, batch] = model.decode(batch, context).total_s
    return found


def _limited(host: HostProfile, cores: int) -> Device:
    """The host with no more cores than the ranks use."""
    measured = tuple(m for m in host.measured if m.cores <= cores)
    return msgspec.structs.replace(host, measured=measured)


def _plot(
    batches: Sequence[int],
    arms: Sequence[Arm],
    step_s: dict[tuple[Arm, int], float],
    predicted: dict[tuple[Arm, int], float],
) -> Plot:
    single = [arm for arm in arms if arm.threads == 1]
    ranks = tuple(float(arm.ranks) for arm in single)
    series = [Series(label="ideal", x=ranks, y=ranks, dashed=True)]
    for batch in batches:
        for label, times, dashed in (
            (f"batch {batch}", step_s, False),
            (f"batch {batch}, predicted", predicted, True),
        ):
            y = tuple(times[ONE, batch] / times[arm, batch] for arm in single)
            series.append(Series(label=label, x=ranks, y=y, dashed=dashed))
    return Plot(
        title="Strong scaling of a decode step, one thread a rank",
        x_label="ranks",
        y_label="speed-up over one rank",
        series=tuple(series),
    )
