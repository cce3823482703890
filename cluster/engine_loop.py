"""The engine thread: plans steps, commits results, ends what is due.

It owns the scheduler, the jobs and, once started, the rank group. Everybody else leaves a note in
its inbox and wakes it. Of a request it holds prompt, generated tokens, parameters and seed, which
is all that is needed to compute it again; no tensor, no text. So when ranks are lost and the group
is rebuilt, every request goes on from there, and its reader notices nothing but a pause.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import structlog

from cluster.beams import Beam
from cluster.diagnosis import RanksLost
from cluster.errors import Abandoned, NoToken, Unavailable
from cluster.jobs import Job, Sample
from cluster.rank_group import RankGroup
from cluster.recovery import Recoveries
from cluster.request import FinishReason, HealthState, TokenEvent
from cluster.scheduler import Scheduler
from cluster.sequence import Sequence
from shards.contract import NO_TOKEN, PhaseSeconds, Sampled, StepPlan, StepResult
from shards.timing import add

log = structlog.get_logger(__name__)

STOPPING = "the server is stopping"
# Plans that are sent before the oldest one's result is back: the ranks never wait for the driver.
_PIPELINE = 2
# The ranks' own deadline is shorter than this thread's, so that they can say who is missing.
_STEP_GRACE_S = 5.0
# The kernel counts a wait in milliseconds and 32 bits; a deadline may be years away.
_LONGEST_WAIT_S = 60.0
_MOST_DEAD_DEADLINES = 64


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step as the driver saw it: when its plan left and its result was back (unix time, ns),
    how many tokens of how many sequences it computed, and where rank 0's time went. Two plans are
    under way at a time, so that a step may wait for the one before it."""

    step: int
    epoch: int
    sent_ns: int
    received_ns: int
    sequences: int
    tokens: int
    seconds: PhaseSeconds


OnStep = Callable[[StepSample], None]


class EngineLoop:
    """Runs jobs on a rank group until `stop`, or until the group is lost.

    Methods of the first half are for any thread, and none of them blocks but `stop`; `on_end` is
    told the id of every job that has ended; `on_state` that the group is being rebuilt (DEGRADED),
    computes again (READY) or is gone (NOT_READY), and why.
    """

    def __init__(
        self,
        group: RankGroup,
        scheduler: Scheduler,
        *,
        step_timeout_s: float,
        recoveries: int,
        on_end: Callable[[str], None],
        on_state: Callable[[HealthState, str], None],
    ) -> None:
        self.steps = 0
        self.generated_tokens = 0
        self.seconds = PhaseSeconds()  # rank 0's, summed over all steps
        self.seconds_between_ends = 0.0  # a running mean
        self._group = group
        self._scheduler = scheduler
        self._step_timeout_s = step_timeout_s
        self._on_end = on_end
        self._on_state = on_state
        self._recoveries = Recoveries(recoveries)
        self._lost_at: float | None = None  # while the group is being rebuilt
        self._inbox: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._closing = threading.Lock()
        self._lost: str | None = None
        self._jobs: dict[str, Job] = {}
        self._samples: dict[Sequence, Sample] = {}
        self._suspects: dict[str, Job] = {}  # the first may run, the others wait for it
        self._unstarted: list[Sample] = []
        self._deadlines: list[tuple[float, str]] = []
        self._sent: deque[float] = deque()
        self._last_end: float | None = None
        self._askers: list[Future[None]] = []
        self._on_step: OnStep | None = None
        self._sample_every = 0
        self._sampled: dict[int, tuple[int, StepPlan]] = {}
        self._thread = threading.Thread(target=self._run, name="headwise-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every job, the thread and the group. Idempotent."""
        self._stopping = True
        self._group.wake()
        self._thread.join()

    def begin(self, job: Job) -> None:
        """Admit a job; one that comes too late ends at once, with the cause."""
        with self._closing:
            if self._lost is None:
                self._post(lambda: self._begin(job))
                return
        job.stream.end(Unavailable(self._lost))

    def end_job(self, request_id: str, reason: FinishReason) -> None:
        """End all samples of a job; its stream is told."""
        self._post(lambda: self._end_job(request_id, reason))

    def finish_sample(self, request_id: str, index: int) -> None:
        """End one sample, of which its reader has seen enough."""
        self._post(lambda: self._finish_sample(request_id, index))

    def drop_job(self, request_id: str) -> None:
        """End a job that nobody reads any more."""
        self._post(lambda: self._drop_job(request_id))

    def ask_ranks(self) -> Future[None]:
        """Have the ranks tell their counters to the group's `states`; done when all have, or when
        the group is lost."""
        asker: Future[None] = Future()
        with self._closing:
            if self._lost is None:
                self._post(lambda: self._ask_ranks(asker))
                return asker
        asker.set_result(None)
        return asker

    def sample_steps(self, every: int, on_step: OnStep) -> None:
        """Tell `on_step`, which must not block, of one in `every` steps; from the engine thread."""

        def begin() -> None:
            self._sample_every, self._on_step = every, on_step

        self._post(begin)

    def _post(self, note: Callable[[], None]) -> None:
        self._inbox.append(note)
        self._group.wake()

    # The engine thread's own.

    def _run(self) -> None:
        cause = STOPPING
        try:
            while not self._stopping:
                self._work_through_inbox()
                self._expire(time.monotonic())
                try:
                    self._compute()
                except RanksLost as lost:
                    self._recover(lost)
        except RanksLost as lost:
            cause = str(lost)
            log.error("shard group lost", cause=cause, rank=lost.rank)
        except Exception as error:
            cause = f"the driver failed: {error}"
            log.exception("driver failed")
        self._on_state(HealthState.NOT_READY, cause)
        with self._closing:
            self._lost = cause
        self._work_through_inbox()
        for job in self._jobs.values():
            job.stream.end(Unavailable(cause))
        for asker in self._askers:
            asker.set_result(None)
        self._group.stop()

    def _compute(self) -> None:
        if self._group.ready:
            self._send_plans()
        for result in self._group.poll(self._patience()):
            self._commit(result)
        self._answer_askers()
        if self._overdue():
            raise self._group.stuck(self._step_timeout_s)
        if self._lost_at is not None and self._group.ready:
            seconds, self._lost_at = time.monotonic() - self._lost_at, None
            log.info("shard group rebuilt", epoch=self._group.epoch, seconds=round(seconds, 3))
            self._on_state(HealthState.READY, "")

    def _recover(self, lost: RanksLost) -> None:
        """Have the group rebuilt, and every job computed again from what is known of it."""
        now = time.monotonic()
        if lost.final or not self._recoveries.take(now):
            first = self._group.lost
            if self._lost_at is None or first is None:
                raise lost
            raise RanksLost(f"{first}; and then: {lost}", first.rank) from lost
        log.warning("ranks lost", cause=str(lost), replaced=lost.replace, epoch=self._group.epoch)
        self._lost_at = self._lost_at or now
        self._suspect(lost, now)
        self._sent.clear()
        self._sampled.clear()
        self._scheduler.reset(self._group.epoch + 1)
        self._group.rebuild(lost)
        self._on_state(HealthState.DEGRADED, str(self._group.lost or lost))

    def _suspect(self, lost: RanksLost, now: float) -> None:
        """Any job whose step was lost may be what took the rank along. So they start again one by
        one, and who is lost at it a second time ends."""
        flight = [self._samples[s] for s in self._scheduler.in_flight() if s in self._samples]
        jobs = {sample.job.request.id: sample.job for sample in flight}
        for request_id, job in sorted(jobs.items(), key=lambda item: item[1].arrived):
            if not job.suspicion.confirm(now):
                self._suspects.setdefault(request_id, job)
                continue
            job.stream.end(
                Abandoned(
                    f"request {request_id} was being computed when ranks were lost, again and "
                    f"again; it is not tried once more ({lost})"
                )
            )
            self._drop_job(request_id)
        for sample in (s for job in self._suspects.values() for s in job.samples):
            sample.sequence.held = True
        self._release_suspect()

    def _release_suspect(self) -> None:
        for sample in next(iter(self._suspects.values())).samples if self._suspects else ():
            sample.sequence.held = False

    def _clear(self, job: Job) -> None:
        """A job that got a token, or has ended, holds up no other suspect."""
        job.suspicion.clear()
        if self._suspects.pop(job.request.id, None) is not None:
            for sample in job.samples:
                sample.sequence.held = False
            self._release_suspect()

    def _work_through_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _ask_ranks(self, asker: Future[None]) -> None:
        if not self._askers and self._lost is None and self._group.ready:
            self._group.ask()
        self._askers.append(asker)

    def _answer_askers(self) -> None:
        if self._askers and self._group.answered:
            for asker in self._askers:
                asker.set_result(None)
            self._askers.clear()

    def _send_plans(self) -> None:
        while len(self._sent) < _PIPELINE:
            plan = self._scheduler.plan(self.steps + 1, self._group.epoch)
            if plan is None:
                return
            self.steps += 1
            self._group.send(plan)
            now = time.monotonic()
            self._sent.append(now)
            if self._on_step is not None and self.steps % self._sample_every == 0:
                self._sampled[plan.step] = (time.time_ns(), plan)
            if plan.start:
                self._unstarted = [s for s in self._unstarted if not s.note_start(now)]

    def _commit(self, result: StepResult) -> None:
        self._sent.popleft()
        self.seconds = add(self.seconds, result.seconds)
        if self._sent:
            self._sent[0] = time.monotonic()  # the next one's turn begins only now
        if self._sampled:
            self._tell_of_step(result)
        for found in result.prompt_logprobs:
            owner = self._scheduler.owner(result, found.slot)
            if owner is not None:
                self._samples[owner].take_prompt(found)
        now = time.monotonic()
        for sequence, sampled in self._scheduler.commit(result):
            self.generated_tokens += sampled.token != NO_TOKEN
            sample = self._samples.get(sequence)
            if sample is None:  # its job has just been given up
                continue
            self._clear(sample.job)
            if sampled.token == NO_TOKEN:
                self._give_up(sample.job, sampled)
                continue
            if sample.job.beam is not None:
                self._search_on(sample.job, sample.job.beam, sequence, sampled, now)
                continue
            self._push(sample, sample.take(sampled, now))
            if not sample.open:
                self._retire(sample, now)

    def _tell_of_step(self, result: StepResult) -> None:
        sent_ns, plan = self._sampled.pop(result.step, (0, None))
        if plan is not None and self._on_step is not None:
            sample = StepSample(
                step=result.step,
                epoch=result.epoch,
                sent_ns=sent_ns,
                received_ns=time.time_ns(),
                sequences=len(plan.work),
                tokens=sum(work.count for work in plan.work),
                seconds=result.seconds,
            )
            try:
                self._on_step(sample)
            except Exception:
                # Who watches must not end what is watched.
                log.exception("steps are not sampled any more")
                self._on_step = None

    def _give_up(self, job: Job, sampled: Sampled) -> None:
        """End a job that no token can be picked for; the others of the step go on."""
        position, fault = sampled.position, sampled.fault
        log.error(
            "no token can be picked", request_id=job.request.id, position=position, fault=fault
        )
        cause = (
            "the logits hold NaN or infinity, or every token is barred; check the sampling "
            "parameters, the checkpoint and dtype"
        )
        if fault:
            cause = f"the constraint cannot be held to any further ({fault})"
        job.stream.end(NoToken(f"no token can be picked at position {position}: {cause}"))
        self._drop_job(job.request.id)

    def _search_on(
        self, job: Job, beam: Beam, sequence: Sequence, sampled: Sampled, now: float
    ) -> None:
        """Take what may follow a hypothesis; the last one lets the search go on, or ends it."""
        assert sampled.logprobs is not None
        job.samples[0].note_token(now)
        children = beam.take(sequence, sampled.logprobs)
        if beam.search.over:
            for sample, found in zip(job.samples, beam.search.finished, strict=True):
                self._push(sample, sample.take_found(found, now))
                self._retire(sample, now)
        elif children:
            beam.live = self._scheduler.fork(beam.sequences, children)

    def _patience(self) -> float | None:
        """Seconds to wait for results before something else is due."""
        due = [self._sent[0] + self._step_limit()] if self._sent else []
        if self._deadlines:
            due.append(self._deadlines[0][0])
        if self._inbox:
            return 0
        return min(max(0.0, min(due) - time.monotonic()), _LONGEST_WAIT_S) if due else None

    def _step_limit(self) -> float:
        return self._step_timeout_s + _STEP_GRACE_S

    def _overdue(self) -> bool:
        return bool(self._sent) and time.monotonic() - self._sent[0] >= self._step_limit()

    def _begin(self, job: Job) -> None:
        self._jobs[job.request.id] = job
        log.debug(
            "request admitted",
            request_id=job.request.id,
            prompt_tokens=len(job.request.prompt),
            samples=len(job.samples),
        )
        if job.request.deadline is not None:
            heapq.heappush(self._deadlines, (job.request.deadline, job.request.id))
        for sample in job.samples:
            self._samples[sample.sequence] = sample
            self._unstarted.append(sample)
            if not sample.sequence.resting:
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
            self._push(sample, sample.end(reason, now))
            self._retire(sample, now)

    def _finish_sample(self, request_id: str, index: int) -> None:
        job = self._jobs.get(request_id)
        if job is None or not job.samples[index].open:
            return
        if job.beam is not None:
            job.samples[index].shown = False  # its search is the others' as well
        else:
            self._drop(job.samples[index])

    def _drop_job(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        if job is not None:
            for sample in job.open_samples:
                self._drop(sample)

    def _push(self, sample: Sample, event: TokenEvent) -> None:
        if sample.shown:
            sample.job.stream.push(event)

    def _drop(self, sample: Sample) -> None:
        sample.open = False
        self._retire(sample, time.monotonic())

    def _retire(self, sample: Sample, now: float) -> None:
        """Forget a sample that has ended, and its job with the last one."""
        self._scheduler.remove(sample.sequence)
        del self._samples[sample.sequence]
        gap = 0.0 if self._last_end is None else now - self._last_end
        self.seconds_between_ends += 0.2 * (gap - self.seconds_between_ends)
        self._last_end = now
        job = sample.job
        if not job.open_samples:
            del self._jobs[job.request.id]
            self._clear(job)
            log.debug("request ended", request_id=job.request.id)
            job.stream.end()
            self._on_end(job.request.id)
            if len(self._deadlines) > 2 * len(self._jobs) + _MOST_DEAD_DEADLINES:
                self._deadlines = [(at, name) for at, name in self._deadlines if name in self._jobs]
                heapq.heapify(self._deadlines)
