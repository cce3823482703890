"""Ranks on threads of this process: the production runner, or the whole worker, without Ray."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.blocks import BlockPool
from cluster.links import RankLinks
from cluster.rank_group import Placement
from cluster.scheduler import Scheduler
from cluster.sequence import Sequence
from shards import worker
from shards.checkpoint.loader import load_shard
from shards.collectives.local import ThreadGroup
from shards.config import ShardConfig
from shards.contract import Hello, Sampling, StepPlan, StepResult
from shards.kernels import kernel_set
from shards.kernels.base import KernelSet
from shards.layout import make_layout
from shards.models.decoder import Decoder
from shards.models.mask import reads_whole_prompts
from shards.models.source import open_model
from shards.quantization.choice import Quantization
from shards.runner import Runner

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)


class ThreadRanks:
    """Every rank's `Runner` on a thread of its own, summing through a `ThreadGroup`."""

    def __init__(
        self,
        model: Path,
        world: int,
        *,
        capacity: Many[float] | None = None,
        expert_parallel: bool = False,
        context: int = 256,
        blocks: int = 96,
        block_size: int = 8,
        max_sequences: int = 8,
        max_step_tokens: int = 64,
        kernels: KernelSet[Any] | None = None,
        quantization: Quantization = "none",
    ) -> None:
        source = open_model(str(model))
        layout = make_layout(source.spec, world, capacity, expert_parallel=expert_parallel)
        self.vocabulary = source.spec.vocabulary
        self.whole_prompts = reads_whole_prompts(source.spec)
        self.blocks, self.block_size, self.max_sequences = blocks, block_size, max_sequences
        self._pool = ThreadPoolExecutor(world)
        self._runners = []
        group = ThreadGroup(world, deadline_s=60)
        kernels = kernels or kernel_set(CPU, torch.float32, threads=1)
        for collective in (group[rank] for rank in range(world)):
            weights = load_shard(
                source, layout, collective.rank, torch.float32, CPU, quantization=quantization
            )
            decoder = Decoder(source.spec, layout, collective.rank, weights, kernels)
            self._runners.append(
                Runner(
                    decoder,
                    kernels,
                    source.spec,
                    layout,
                    collective,
                    blocks=blocks,
                    block_size=block_size,
                    max_sequences=max_sequences,
                    max_step_tokens=max_step_tokens,
                    context=min(context, source.spec.context),
                    device=CPU,
                )
            )

    def execute(self, plan: StepPlan) -> StepResult:
        """Rank 0's result, when every rank is done."""
        results = list(self._pool.map(lambda runner: runner.execute(plan), self._runners))
        return results[0]

    def close(self) -> None:
        self._pool.shutdown()


@contextmanager
def thread_ranks(model: Path, world: int, **options: object) -> Iterator[ThreadRanks]:
    ranks = ThreadRanks(model, world, **options)  # type: ignore[arg-type]
    try:
        yield ranks
    finally:
        ranks.close()


def generate(
    ranks: ThreadRanks,
    prompts: Many[Many[int]],
    steps: int,
    *,
    sampling: Sampling = GREEDY,
    max_step_tokens: int = 16,
) -> list[tuple[list[int], np.ndarray]]:
    """`steps` tokens for each prompt, all at once, and the logits [steps, vocabulary] behind them.

    Prompts longer than `max_step_tokens` are computed in chunks, beside running decodes, but by a
    model that reads prompts whole.
    """
    scheduler = Scheduler(
        BlockPool(ranks.blocks, ranks.block_size, prefix_caching=not ranks.whole_prompts),
        max_sequences=ranks.max_sequences,
        max_step_tokens=max_step_tokens,
        whole_prompts=ranks.whole_prompts,
    )
    sequences = [
        Sequence(
            request_id=str(i),
            index=0,
            tokens=list(prompt),
            prompt_length=len(prompt),
            max_length=len(prompt) + steps,
            sampling=sampling,
            arrival=i,
            want_logits=True,
        )
        for i, prompt in enumerate(prompts)
    ]
    logits: dict[str, list[np.ndarray]] = {s.request_id: [] for s in sequences}
    for sequence in sequences:
        scheduler.add(sequence)
    step = 0
    while plan := scheduler.plan(step := step + 1, 1):
        for sequence, sampled in scheduler.commit(ranks.execute(plan)):
            assert sampled.logits is not None
            logits[sequence.request_id].append(np.frombuffer(sampled.logits, np.float32))
            if len(sequence.tokens) == sequence.max_length:
                scheduler.remove(sequence)
    return [(s.tokens[s.prompt_length :], np.stack(logits[s.request_id])) for s in sequences]


class ThreadLauncher:
    """Runs `shards.worker.serve` on threads: the driver, its sockets and the shared memory are the
    production ones."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._threads: list[threading.Thread] = []
        self._current: dict[int, threading.Thread] = {}
        self._deaths: dict[int, str] = {}

    def place(self) -> Placement:
        return Placement(("here",) * self._world, listen=None)

    def launch(self, shards: Many[ShardConfig], links: RankLinks) -> None:
        for shard in shards:
            self._start(shard, links)

    def replace(self, shard: ShardConfig, links: RankLinks, process: Hello | None) -> None:
        """The old thread has ended, or does when it hears that its socket is gone."""
        self._current.pop(shard.rank)
        self._deaths.pop(shard.rank, None)
        self._start(shard, links)

    def _start(self, shard: ShardConfig, links: RankLinks) -> None:
        shard = pickle.loads(pickle.dumps(shard))  # as it would reach another process
        thread = threading.Thread(
            target=self._run,
            args=(shard, links.address, links.token, links.wake),
            name=f"rank-{shard.rank}",
            daemon=True,
        )
        self._threads.append(thread)
        self._current[shard.rank] = thread
        thread.start()

    def deaths(self) -> dict[int, str]:
        return dict(self._deaths)

    def stop(self, grace_s: float) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} did not leave"

    def _run(self, shard: ShardConfig, address: str, token: str, wake: Callable[[], None]) -> None:
        cause = "it left"
        try:
            worker.serve(shard, address, token)
        except BaseException as error:
            cause = str(error)
        if self._current.get(shard.rank) is threading.current_thread():
            self._deaths[shard.rank] = cause
            with suppress(OSError):
                wake()
