"""The driver of one model copy: brings up its ranks, admits requests, says how it is doing.

What runs is the engine loop's (`cluster/engine_loop.py`), on a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from cluster.blocks import BlockPool
from cluster.blueprint import Blueprint
from cluster.engine_loop import STOPPING, EngineLoop
from cluster.errors import InvalidRequest, Overloaded, Unavailable, Violation
from cluster.jobs import Job, max_length, sequences_of
from cluster.rank_group import Launcher, OnProgress, RankGroup
from cluster.request import (
    FinishReason,
    Health,
    HealthState,
    Load,
    ModelInfo,
    RankCounters,
    RankHealth,
    RankInfo,
    Request,
)
from cluster.scheduler import Scheduler
from cluster.stream import EventStream
from cluster.text import TextCodec
from shards.collectives import choose
from shards.contract import Tokenizer

log = structlog.get_logger(__name__)

# Bounds, in seconds, of the hint when to try again.
_RETRY_AFTER_S = (0.1, 30.0)
# How old the ranks' counters may be, and how long to wait for new ones: a step may take longer.
_COUNTERS_AGE_S = 2.0
_COUNTERS_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Whole:
    """The state of the driver as a whole."""

    state: HealthState
    cause: str
    since: float


class Driver:
    """Implements `cluster.request.Generator` over the ranks of a `Blueprint`.

    `start` blocks until the group is READY, `stop` until everything has ended. All else may be
    called from any thread, and does not block. `codec` is None for a model without a tokenizer.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self.codec: TextCodec | None = None
        self.collective = ""
        self._model = blueprint.model
        self._ranks: tuple[RankInfo, ...] = ()
        self._whole = _Whole(HealthState.STARTING, "starting", time.time())
        self._group: RankGroup | None = None
        self._pool: BlockPool | None = None
        self._scheduler: Scheduler | None = None
        self._loop: EngineLoop | None = None
        self._admission = threading.Lock()
        self._samples: dict[str, int] = {}  # of every admitted request that has not ended
        self._arrivals = 0
        self._asked_at = float("-inf")
        self._answer: Future[None] | None = None

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def ranks(self) -> tuple[RankInfo, ...]:
        return self._ranks

    @property
    def loop(self) -> EngineLoop:
        """The running engine, for its counters; there is none before `start`."""
        if self._loop is None:
            raise Unavailable(self._whole.cause)
        return self._loop

    def start(self, launcher: Launcher, on_progress: OnProgress | None = None) -> None:
        """Bring up the ranks through `launcher` and begin to serve.

        Raises `StartupError`, or what else kept a rank from loading; nothing is left running then.
        """
        try:
            with ThreadPoolExecutor(1) as pool:
                codec = pool.submit(self._load_codec)
                group = self._form_group(
                    launcher, on_progress, lambda: self._take_codec(codec.result())
                )
        except BaseException as error:
            self._enter(HealthState.NOT_READY, str(error) or type(error).__name__)
            if self._group is None:
                launcher.stop(0)
            else:
                self._group.stop(0)
            raise
        config = self.blueprint.config
        whole_prompts = self.blueprint.whole_prompts
        prefix_caching = config.prefix_caching and not whole_prompts
        self._pool = BlockPool(group.blocks, config.block_size, prefix_caching)
        self._scheduler = Scheduler(
            self._pool,
            max_sequences=config.max_sequences,
            max_step_tokens=config.max_step_tokens,
            window=self.blueprint.window,
            whole_prompts=whole_prompts,
        )
        self._loop = EngineLoop(
            group,
            self._scheduler,
            step_timeout_s=config.step_timeout_s,
            recoveries=config.recoveries,
            on_end=self._forget,
            on_state=self._enter,
        )
        self._enter(HealthState.READY, "")
        self._loop.start()

    def stop(self) -> None:
        """End every stream and every rank. Idempotent."""
        if self._loop is not None:
            self._loop.stop()
        self._enter(HealthState.NOT_READY, STOPPING)

    def submit(self, request: Request) -> EventStream:
        with self._admission:  # what comes for this id from now on comes after its beginning
            loop = self._admit(request)
            self._samples[request.id] = sequences_of(request)
            self._arrivals += 1
            stream = EventStream(
                finish_sample=lambda index: loop.finish_sample(request.id, index),
                close=lambda: loop.drop_job(request.id),
            )
            job = Job(
                request,
                stream,
                eos_token_ids=self._model.eos_token_ids,
                context=self._model.context,
                arrival=self._arrivals,
            )
            loop.begin(job)
        return stream

    async def abort(self, request_id: str) -> bool:
        with self._admission:
            if self._loop is None or request_id not in self._samples:
                return False
        self._loop.end_job(request_id, FinishReason.ABORTED)
        return True

    def load(self) -> Load:
        scheduler, pool, loop = self._scheduler, self._pool, self._loop
        if scheduler is None or pool is None or loop is None:
            return Load(0, 0, 0, 0, self.blueprint.config.block_size, 0, 0, 0, 0, 0)
        running = scheduler.running
        return Load(
            running=running,
            waiting=max(0, self._admitted() - running),
            kv_blocks=pool.blocks,
            kv_blocks_used=pool.used,
            block_size=pool.block_size,
            steps=loop.steps,
            preemptions=scheduler.preemptions,
            generated_tokens=loop.generated_tokens,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            waiting_tokens=scheduler.waiting_tokens,
        )

    def health(self) -> Health:
        whole, group = self._whole, self._group
        if group is None:
            return Health(whole.state, whole.cause, whole.since, 0, ())
        ranks = tuple(self._rank_health(group, rank) for rank in range(group.world))
        return Health(whole.state, whole.cause, whole.since, group.epoch, ranks)

    async def rank_counters(self) -> tuple[RankCounters, ...]:
        """Of every rank that has told them so far; the ranks are asked between two steps, and at
        most every few seconds. Returns soon, with what is known, also where they do not answer."""
        loop, group = self._loop, self._group
        if loop is None or group is None:
            return ()
        with self._admission:
            now = time.monotonic()
            if now - self._asked_at >= _COUNTERS_AGE_S:
                self._asked_at, self._answer = now, loop.ask_ranks()
            answer = self._answer
        if answer is not None and not answer.done():
            await asyncio.wait([asyncio.wrap_future(answer)], timeout=_COUNTERS_PATIENCE_S)
        told = [state.status for state in group.states]
        return tuple(
            RankCounters(
                status.rank, status.steps, status.seconds, status.rss, status.expert_tokens
            )
            for status in told
            if status is not None
        )

    def _rank_health(self, group: RankGroup, rank: int) -> RankHealth:
        whole, known = self._whole, group.states[rank]
        state, cause = whole.state, whole.cause
        if state is HealthState.STARTING and known.loaded is not None:
            state, cause = HealthState.READY, ""
        elif state is HealthState.DEGRADED:
            if known.loaded is None:
                state, cause = HealthState.STARTING, f"{cause}; its replacement is starting"
            else:
                cause = f"waits for the group to be rebuilt: {cause}"
        elif group.lost is not None and group.lost.rank not in (None, rank):
            cause = f"computes nothing without rank {group.lost.rank}"
        host, pid = ("", 0) if known.hello is None else (known.hello.host, known.hello.pid)
        return RankHealth(rank, host, pid, state, cause, whole.since)

    def _admitted(self) -> int:
        """Samples of all requests that have not ended, waiting or running."""
        return sum(tuple(self._samples.values()))

    def _admit(self, request: Request) -> EngineLoop:
        """Refuse what cannot be served, now or ever; the loop that will serve the rest."""
        config, scheduler, loop = self.blueprint.config, self._scheduler, self._loop
        if self._whole.state is HealthState.NOT_READY or scheduler is None or loop is None:
            raise Unavailable(self._whole.cause)
        if request.id in self._samples:
            raise InvalidRequest(
                Violation("request_id", f"{request.id!r} is in use by a request that still runs")
            )
        length = max_length(request, self._model.context)
        known = len(request.prompt) + len(request.generated)
        if not 0 < known < length:
            raise InvalidRequest(
                Violation(
                    "prompt",
                    f"{known} tokens, prompt and generated ones together, where the request ends "
                    f"at {length}: give at least one, and leave room for another",
                )
            )
        if not scheduler.fits(length):
            room = self.load().kv_blocks * config.block_size
            raise InvalidRequest(
                Violation(
                    "stopping.max_tokens",
                    f"a prompt of {len(request.prompt)} tokens and what may follow come to "
                    f"{length} tokens, and the KV cache holds {room}: ask for fewer, or serve with "
                    "a larger --kv-memory",
                )
            )
        retry_after = min(max(loop.seconds_between_ends, _RETRY_AFTER_S[0]), _RETRY_AFTER_S[1])
        admitted, limit = self._admitted(), config.max_sequences + config.max_queued_requests
        if admitted + sequences_of(request) > limit:
            raise Overloaded(
                f"{admitted} sequences are waiting or running, and the server takes {limit}",
                retry_after,
            )
        tokens = scheduler.waiting_tokens
        if tokens and tokens + len(request.prompt) * request.n > config.max_queued_tokens:
            raise Overloaded(
                f"{tokens:,} prompt tokens are waiting, and the queue takes "
                f"{config.max_queued_tokens:,}",
                retry_after,
            )
        return loop

    def _forget(self, request_id: str) -> None:
        self._samples.pop(request_id, None)

    def _enter(self, state: HealthState, cause: str) -> None:
        """From NOT_READY nothing leads back. An outage begins with its first cause."""
        if self._whole.state in (HealthState.NOT_READY, state):
            return
        group = self._group
        if state is HealthState.READY and group is not None:
            ranks = range(group.world)
            self._ranks = tuple(rank_info(self.blueprint, group, rank) for rank in ranks)
        self._whole = _Whole(state, cause, time.time())

    def _load_codec(self) -> TextCodec | None:
        source, config = self.blueprint.source, self.blueprint.config
        if config.tokenizer is not None:
            other = Path(config.tokenizer)
            if other.suffix == ".gguf":
                return TextCodec.load(str(other.parent), other.name)
            return TextCodec.load(config.tokenizer, revision=config.revision)
        if source.tokenizer_path is None:
            return None
        return TextCodec.load(source.tokenizer_path, source.tokenizer_gguf)

    def _take_codec(self, codec: TextCodec | None) -> Tokenizer | None:
        """Keep a codec and its end tokens; what rank 0 needs of it."""
        self.codec = codec
        if codec is None:
            return None
        both = dict.fromkeys((*self._model.eos_token_ids, *codec.eos_token_ids))
        known = tuple(token for token in both if token < self._model.vocabulary)
        self._model = replace(self._model, eos_token_ids=known)
        spelled = tuple(token for token in known if token < codec.size)
        return Tokenizer(codec.tokenizer_json, spelled)

    def _form_group(
        self,
        launcher: Launcher,
        on_progress: OnProgress | None,
        tokenizer: Callable[[], Tokenizer | None],
    ) -> RankGroup:
        blueprint, config = self.blueprint, self.blueprint.config
        if blueprint.widened:
            log.warning("weights kept as floats: not cut in blocks of 32", names=blueprint.widened)
        placement = launcher.place()
        world = blueprint.layout.world
        collective = choose(
            config.collective, world=world, device=config.device, one_host=placement.one_host
        )
        self.collective = collective
        group = self._group = RankGroup(
            world,
            launcher,
            collective=collective,
            block_bytes=blueprint.block_bytes,
            max_blocks=blueprint.max_blocks,
            start_timeout_s=config.start_timeout_s,
        )
        shards = [
            blueprint.shard(rank, collective, placement.host_ranks(rank)) for rank in range(world)
        ]
        group.start(placement, shards, on_progress, tokenizer)
        return group


def rank_info(blueprint: Blueprint, group: RankGroup, rank: int) -> RankInfo:
    """What a started rank holds; heads and channels are the first layer's."""
    state, first = group.states[rank], blueprint.layout.layers[0]
    vocabulary = blueprint.layout.vocabulary[rank]
    hello, loaded = state.hello, state.loaded
    assert hello is not None
    assert loaded is not None
    return RankInfo(
        rank=rank,
        host=hello.host,
        pid=hello.pid,
        heads=(first.heads[rank].start, first.heads[rank].stop),
        kv_heads=(first.kv_heads[rank].start, first.kv_heads[rank].stop),
        channels=(first.channels[rank].start, first.channels[rank].stop),
        vocabulary=(vocabulary.start, vocabulary.stop),
        weight_bytes=loaded.weight_bytes,
        kv_bytes=group.blocks * blueprint.block_bytes[rank],
    )
