"""A rank's life: connect to the driver, load its slice, then serve plans until told to stop.

Runs in a Ray actor (`shards/actor.py`) or, in tests, on a thread: it needs a socket, not ray.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import psutil
import torch

from shards import collectives, cores
from shards.channel import Channel, ChannelClosed, connect
from shards.checkpoint.loader import load_shard
from shards.collectives.base import Collective
from shards.config import ShardConfig
from shards.contract import (
    Failure,
    Hello,
    Join,
    Joined,
    Leave,
    Left,
    Loaded,
    PhaseSeconds,
    Progress,
    Query,
    RankStatus,
    StepPlan,
    Stop,
    Tokenizer,
    ToRank,
    decode_to_rank,
)
from shards.errors import CollectiveAborted, CollectiveError, HeadwiseError
from shards.grammar import GrammarError, GrammarTokenizer
from shards.kernels import kernel_set
from shards.memory import KV_SHARE, device_bytes_left, peak_rss
from shards.models.decoder import Decoder
from shards.runner import Runner
from shards.timing import add

_CONNECT_TIMEOUT_S = 30.0
_PROGRESS_INTERVAL_S = 0.1


class Worker:
    """One rank, from its loaded weights on."""

    def __init__(self, config: ShardConfig, channel: Channel, threads: int) -> None:
        self._config = config
        self._channel = channel
        self._device = torch.device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._kernels = kernel_set(self._device, self._dtype, threads, config.quantization)
        self._decoder: Decoder[Any] | None = None
        self._collective: Collective | None = None
        self._runner: Runner | None = None
        self._tokenizer: GrammarTokenizer | None = None
        self._epoch = 0
        self._steps = 0
        self._seconds = PhaseSeconds()

    def load(self) -> None:
        """Read this rank's slice of the weights and report what room is left."""
        config, began = self._config, time.perf_counter()
        weights = load_shard(
            config.source,
            config.layout,
            config.rank,
            self._dtype,
            self._device,
            self._progress(),
            quantization=config.quantization,
        )
        held = sum(weight.nbytes for weight in weights.values())
        self._decoder = Decoder(
            config.source.spec,
            config.layout,
            config.rank,
            weights,
            self._kernels,
            config.context,
        )
        left = int(device_bytes_left(config.device) * KV_SHARE[self._device.type])
        room = left // config.host_ranks if config.kv_memory is None else config.kv_memory
        self._channel.send(Loaded(config.rank, held, room, time.perf_counter() - began, peak_rss()))

    def serve(self) -> None:
        """Execute what the driver sends, until `Stop`.

        A collective that fails ends the epoch, not this rank: it waits, weights in hand, for the
        driver to form the next one. Whatever else fails is raised.
        """
        while not isinstance(message := decode_to_rank(self._channel.receive()), Stop):
            try:
                self._obey(message)
            except CollectiveError as error:
                self._channel.send(_failure(self._config.rank, error))
            else:
                continue
            self.close()  # only now: the error held on to what it went through

    def close(self) -> None:
        """Leave the epoch: drop the cache and the collective, keep the weights."""
        self._runner = None
        if self._collective is not None:
            self._collective.close()
            self._collective = None
        gc.collect()  # the next epoch's cache needs the room of this one's

    def _obey(self, message: ToRank) -> None:
        match message:
            case StepPlan() as plan:
                self._step(plan)
            case Tokenizer() as tokenizer:
                # One that no grammar goes with leaves constrained requests unserved, which the
                # driver's side refuses.
                with contextlib.suppress(GrammarError):
                    self._tokenizer = GrammarTokenizer(
                        tokenizer.tokenizer_json, tokenizer.end_tokens
                    )
            case Join() as join:
                self._join(join)
            case Leave() as leave:
                self.close()
                self._channel.send(Left(self._config.rank, leave.epoch))
            case Query():
                self._channel.send(
                    RankStatus(
                        self._config.rank,
                        self._steps,
                        self._seconds,
                        psutil.Process().memory_info().rss,
                        {} if self._decoder is None else self._decoder.expert_loads(),
                    )
                )

    def _progress(self) -> Callable[[int, int], None]:
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last >= _PROGRESS_INTERVAL_S:
                last = now
                self._channel.send(Progress(self._config.rank, done, total))

        return report

    def _join(self, join: Join) -> None:
        config = self._config
        if self._decoder is None:
            raise RuntimeError("asked to join an epoch before the weights are loaded")
        self.close()
        self._epoch = join.epoch
        segment = None
        if config.collective == "shared_memory":
            segment = self._channel.receive_descriptor()
        try:
            self._collective = collectives.connect(
                config.collective,
                rank=config.rank,
                world=config.layout.world,
                epoch=join.epoch,
                deadline_s=config.deadline_s,
                rendezvous=join.rendezvous,
                segment=segment,
                device=config.device,
            )
        finally:
            if segment is not None:
                os.close(segment)
        self._runner = Runner(
            self._decoder,
            self._kernels,
            config.source.spec,
            config.layout,
            self._collective,
            blocks=join.blocks,
            block_size=config.block_size,
            max_sequences=config.max_sequences,
            max_step_tokens=config.max_step_tokens,
            context=config.context,
            device=self._device,
            tokenizer=self._tokenizer,
        )
        self._steps, self._seconds = 0, PhaseSeconds()
        self._channel.send(Joined(config.rank, join.epoch))

    def _step(self, plan: StepPlan) -> None:
        if plan.epoch > self._epoch:
            raise RuntimeError(f"asked for a step of epoch {plan.epoch} before joining it")
        if self._runner is None or plan.epoch < self._epoch:
            return  # it was under way when the epoch ended
        result = self._runner.execute(plan)
        self._steps += 1
        self._seconds = add(self._seconds, result.seconds)
        if self._config.rank == 0:
            self._channel.send(result)


def _failure(rank: int, error: BaseException) -> Failure:
    suspect = error.rank if isinstance(error, CollectiveError) and error.rank is not None else -1
    return Failure(
        rank,
        str(error) or type(error).__name__,
        "".join(traceback.format_exception(error)),
        suspect,
        isinstance(error, HeadwiseError),
        isinstance(error, CollectiveAborted),
        isinstance(error, CollectiveError),
    )


def serve(config: ShardConfig, address: str, token: str) -> None:
    """The whole life of a rank: connect, load, serve, leave. Returns when stopped or abandoned.

    Any other end raises, after the driver was told why.
    """
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // config.host_ranks)
    torch.set_num_threads(threads)
    channel = Channel(connect(address, _CONNECT_TIMEOUT_S))
    # At once: what follows imports kernels, and nobody waits that long for a stranger's name.
    channel.send(Hello(config.rank, token, socket.gethostname(), os.getpid()))
    worker = Worker(config, channel, threads)
    # Not over a network: its transport has threads of its own, which would inherit the core.
    own = cores.take(threads) if config.collective == "shared_memory" else None
    try:
        worker.load()
        worker.serve()
    except ChannelClosed:
        return  # the driver is gone: there is no one left to serve or to tell
    except BaseException as error:
        with contextlib.suppress(ChannelClosed):
            channel.send(_failure(config.rank, error))
        raise
    finally:
        worker.close()
        channel.close()
        if own is not None:
            own.close()
