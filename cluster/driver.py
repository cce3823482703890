"""The driver of one model copy: takes requests, plans steps, commits results, streams tokens.

One thread owns the scheduler, the jobs and the rank group. Everybody else leaves a note in its
inbox and wakes it. Of a request it holds prompt, generated tokens, parameters and seed, which is
all that is needed to compute it again; no tensor, no text.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from cluster.blocks import BlockPool
from cluster.blueprint import Blueprint
from cluster.errors import InvalidRequest, Overloaded, Unavailable, Violation
from cluster.jobs import Job, Sample, max_length
from cluster.rank_group import Launcher, OnProgress, Placement, RankGroup, RanksLost
from cluster.request import (
    FinishReason,
    Health,
    HealthState,
    Load,
    ModelInfo,
    RankHealth,
    RankInfo,
    Request,
)
from cluster.scheduler import Scheduler
from cluster.sequence import Sequence
from cluster.stream import EventStream
from cluster.text import TextCodec
from shards.collectives import Transport, choose
from shards.contract import StepResult

log = structlog.get_logger(__name__)

# Plans that are sent before the oldest one's result is back: the ranks never wait for the driver.
_PIPELINE = 2
# The ranks' own deadline is shorter than the driver's, so that they can say who is missing.
_STEP_GRACE_S = 5.0
_RETRY_S = (0.1, 30.0)


@dataclass(slots=True)
class _State:
    state: HealthState
    cause: str
    since: float


class Driver:
    """Implements `cluster.request.Generator` over the ranks of a `Blueprint`.

    `start` blocks until the group is READY; `stop` ends everything. All other methods may be called
    from any thread, and none of them blocks.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self.codec: TextCodec | None = None
        self.collective = ""
        self._model = blueprint.model
        self._ranks: tuple[RankInfo, ...] = ()
        self._health = _State(HealthState.STARTING, "starting", time.time())
        self._group: RankGroup | None = None
        self._thread: threading.Thread | None = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._admission = threading.Lock()
        self._known: set[str] = set()
        self._arrivals = 0
        self._unplanned = 0  # samples that were submitted and are not in the scheduler yet
        # Below: the engine thread's own.
        self._scheduler: Scheduler | None = None
        self._pool: BlockPool | None = None
        self._jobs: dict[str, Job] = {}
        self._samples: dict[Sequence, Sample] = {}
        self._unstarted: list[Sample] = []
        self._deadlines: list[tuple[float, str]] = []
        self._sent: deque[float] = deque()
        self._step = 0
        self._generated = 0
        self._mean_gap = 0.0
        self._last_finish = 0.0

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def ranks(self) -> tuple[RankInfo, ...]:
        return self._ranks

    def start(self, launcher: Launcher, on_progress: OnProgress | None = None) -> None:
        """Bring up the ranks through `launcher` and begin to serve.

        Raises what `RankGroup.start` raises; the driver is then stopped.
        """
        try:
            with ThreadPoolExecutor(1) as pool:
                codec = pool.submit(self._load_codec)
                self._form_group(launcher, on_progress)
                self.codec = codec.result()
        except BaseException as error:
            self._fail(str(error) or type(error).__name__)
            launcher.stop(0)
            if self._group is not None:
                self._group.stop(0)
            raise
        self._set_health(HealthState.READY, "")
        self._thread = threading.Thread(target=self._serve, name="headwise-driver", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End every stream and every rank. Idempotent."""
        self._stopping = True
        if self._thread is not None:
            self._wake()
            self._thread.join()
        elif self._group is not None:
            self._group.stop()
        self._fail("the server is stopping")

    def submit(self, request: Request) -> EventStream:
        limit = max_length(request, self._model.context)
        with self._admission:
            self._admit(request, limit)
            self._known.add(request.id)
            self._unplanned += request.n
            arrival = self._arrivals = self._arrivals + 1
        stream = EventStream(
            lambda index: self._post(lambda: self._finish_sample(request.id, index)),
            lambda: self._post(lambda: self._drop(request.id)),
        )
        job = Job(
            request,
            stream,
            eos_token_ids=self._model.eos_token_ids,
            context=self._model.context,
            arrival=arrival,
        )
        self._post(lambda: self._begin(job))
        if self._health.state is HealthState.NOT_READY:  # it failed between the check and the post
            stream.end(Unavailable(self._health.cause))
        return stream

    def abort(self, request_id: str) -> bool:
        found = request_id in self._known
        if found:
            self._post(lambda: self._end_job(request_id, FinishReason.ABORTED))
        return found

    def load(self) -> Load:
        scheduler, pool = self._scheduler, self._pool
        if scheduler is None or pool is None:
            return Load(0, 0, 0, 0, self.blueprint.config.block_size, 0, 0, 0)
        return Load(
            running=scheduler.running,
            waiting=scheduler.waiting + self._unplanned,
            kv_blocks=pool.blocks,
            kv_blocks_used=pool.used,
            block_size=pool.block_size,
            steps=self._step,
            preemptions=scheduler.preemptions,
            generated_tokens=self._generated,
        )

    def health(self) -> Health:
        whole, group = self._health, self._group
        states = [] if group is None else group.states
        lost = None if group is None else group.lost
        ranks = []
        for rank, known in enumerate(states):
            state, cause = whole.state, whole.cause
            if whole.state is HealthState.STARTING:
                ready = known.loaded is not None
                state = HealthState.READY if ready else HealthState.STARTING
                cause = "" if ready else "loading weights"
            elif lost is not None and lost.rank not in (None, rank):
                cause = f"waiting for rank {lost.rank}"
            host, pid = ("", 0) if known.hello is None else (known.hello.host, known.hello.pid)
            ranks.append(RankHealth(rank, host, pid, state, cause, whole.since))
        epoch = 0 if group is None else group.epoch
        return Health(whole.state, whole.cause, whole.since, epoch, tuple(ranks))

    # Called by any thread.

    def _admit(self, request: Request, limit: int) -> None:
        config, scheduler = self.blueprint.config, self._scheduler
        if self._health.state is HealthState.NOT_READY or scheduler is None or self._stopping:
            raise Unavailable(self._health.cause or "the server is stopping")
        if request.id in self._known:
            raise InvalidRequest(
                Violation("request_id", f"{request.id!r} is in use by a request that still runs")
            )
        if not scheduler.fits(limit):
            room = self.load().kv_blocks * config.block_size
            raise InvalidRequest(
                Violation(
                    "stopping.max_tokens",
                    f"a prompt of {len(request.prompt)} tokens and what may follow come to {limit} "
                    f"tokens, and the KV cache holds {room}: ask for fewer, or serve with a larger "
                    "--kv-memory",
                )
            )
        waiting = scheduler.waiting + self._unplanned
        free = max(0, config.max_sequences - scheduler.running)
        tokens = scheduler.waiting_tokens
        if waiting + request.n > config.max_queued_requests + max(free, request.n):
            raise Overloaded(
                f"{waiting} sequences are waiting and the queue takes {config.max_queued_requests}",
                self._retry_after(),
            )
        if waiting and tokens + len(request.prompt) * request.n > config.max_queued_tokens:
            raise Overloaded(
                f"{tokens:,} prompt tokens are waiting and the queue takes "
                f"{config.max_queued_tokens:,}",
                self._retry_after(),
            )

    def _retry_after(self) -> float:
        return min(max(self._mean_gap, _RETRY_S[0]), _RETRY_S[1])

    def _post(self, note: Callable[[], None]) -> None:
        self._inbox.append(note)
        self._wake()

    def _wake(self) -> None:
        if self._group is not None:
            self._group.wake()

    def _set_health(self, state: HealthState, cause: str) -> None:
        self._health = _State(state, cause, time.time())

    # Starting.

    def _load_codec(self) -> TextCodec | None:
        source = self.blueprint.source
        if source.tokenizer_path is None:
            return None
        return TextCodec.load(source.tokenizer_path, source.tokenizer_gguf)

    def _form_group(self, launcher: Launcher, on_progress: OnProgress | None) -> None:
        blueprint, config = self.blueprint, self.blueprint.config
        placement = launcher.place()
        self.collective = collective_name(blueprint, placement)
        self._group = RankGroup(
            blueprint.layout.world,
            launcher,
            collective=self.collective,
            block_bytes=blueprint.block_bytes,
            max_blocks=blueprint.max_blocks,
            start_timeout_s=config.start_timeout_s,
        )
        shards = [
            blueprint.shard(rank, self.collective, placement.host_ranks(rank))
            for rank in range(blueprint.layout.world)
        ]
        self._group.start(placement, shards, on_progress)
        self._pool = BlockPool(self._group.blocks, config.block_size)
        self._scheduler = Scheduler(
            self._pool,
            max_sequences=config.max_sequences,
            max_step_tokens=config.max_step_tokens,
        )
        self._ranks = tuple(
            rank_info(blueprint, self._group, rank) for rank in range(blueprint.layout.world)
        )

    # The engine thread.

    def _serve(self) -> None:
        assert self._group is not None
        cause = "the server is stopping"
        try:
            while not self._stopping:
                self._work_through_inbox()
                self._expire(time.monotonic())
                self._send_plans()
                for result in self._group.poll(self._patience()):
                    self._commit(result)
                if self._overdue():
                    raise self._group.stuck(self.blueprint.config.step_timeout_s)
        except RanksLost as lost:
            cause = str(lost)
            log.error("shard group lost", cause=cause, rank=lost.rank)
        except Exception as error:
            cause = f"the driver failed: {error}"
            log.exception("driver failed")
        self._fail(cause)
        self._group.stop()

    def _work_through_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _send_plans(self) -> None:
        assert self._group is not None
        assert self._scheduler is not None
        while len(self._sent) < _PIPELINE:
            plan = self._scheduler.plan(self._step + 1, self._group.epoch)
            if plan is None:
                return
            self._step += 1
            self._group.send(plan)
            now = time.monotonic()
            self._sent.append(now)
            if plan.start:
                self._unstarted = [s for s in self._unstarted if not s.note_start(now)]

    def _commit(self, result: StepResult) -> None:
        assert self._scheduler is not None
        self._sent.popleft()
        if self._sent:
            self._sent[0] = time.monotonic()  # the next one's turn begins only now
        for found in result.prompt_logprobs:
            owner = self._scheduler.owner(result, found.slot)
            if owner is not None:
                self._samples[owner].take_prompt(found)
        now = time.monotonic()
        for sequence, sampled in self._scheduler.commit(result):
            self._generated += 1
            sample = self._samples[sequence]
            sample.job.stream.push(sample.take(sampled, now))
            if not sample.open:
                self._retire(sample, now)

    def _patience(self) -> float | None:
        """Seconds to wait for results before something else is due."""
        due = [self._sent[0] + self._step_limit()] if self._sent else []
        if self._deadlines:
            due.append(self._deadlines[0][0])
        if self._inbox:
            return 0
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _step_limit(self) -> float:
        return self.blueprint.config.step_timeout_s + _STEP_GRACE_S

    def _overdue(self) -> bool:
        return bool(self._sent) and time.monotonic() - self._sent[0] >= self._step_limit()

    def _begin(self, job: Job) -> None:
        assert self._scheduler is not None
        self._unplanned -= job.request.n
        self._jobs[job.request.id] = job
        if job.request.deadline is not None:
            heapq.heappush(self._deadlines, (job.request.deadline, job.request.id))
        for sample in job.samples:
            self._samples[sample.sequence] = sample
            self._unstarted.append(sample)
            self._scheduler.add(sample.sequence)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            job = self._jobs.get(request_id)
            # The id may meanwhile name another request, which has a deadline of its own.
            if job is not None and (job.request.deadline or math.inf) <= now:
                self._end_job(request_id, FinishReason.DEADLINE)

    def _end_job(self, request_id: str, reason: FinishReason) -> None:
        job = self._jobs.get(request_id)
        if job is None:
            return
        now = time.monotonic()
        for sample in job.open_samples:
            job.stream.push(sample.end(reason, now))
            self._retire(sample, now)

    def _finish_sample(self, request_id: str, index: int) -> None:
        job = self._jobs.get(request_id)
        if job is not None and job.samples[index].open:
            job.samples[index].open = False
            self._retire(job.samples[index], time.monotonic())

    def _drop(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        if job is not None:
            for sample in job.open_samples:
                self._finish_sample(request_id, sample.index)

    def _retire(self, sample: Sample, now: float) -> None:
        """Forget a sample that has ended, and its job with the last one."""
        assert self._scheduler is not None
        self._scheduler.remove(sample.sequence)
        del self._samples[sample.sequence]
        gap = now - (self._last_finish or now)
        self._mean_gap, self._last_finish = 0.8 * self._mean_gap + 0.2 * gap, now
        job = sample.job
        if not job.open_samples:
            del self._jobs[job.request.id]
            self._known.discard(job.request.id)
            job.stream.end()

    def _fail(self, cause: str) -> None:
        """End every stream with `cause`; idempotent."""
        if self._health.state is HealthState.NOT_READY:
            return
        self._set_health(HealthState.NOT_READY, cause)
        self._work_through_inbox()
        for job in list(self._jobs.values()):
            job.stream.end(Unavailable(cause))
        self._jobs.clear()
        self._samples.clear()


def collective_name(blueprint: Blueprint, placement: Placement) -> Transport:
    config = blueprint.config
    return choose(
        config.collective,
        world=blueprint.layout.world,
        device=config.device,
        one_host=placement.one_host,
    )


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
