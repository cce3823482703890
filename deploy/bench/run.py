"""Sends the load and notes what comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count, islice, takewhile

from deploy.bench.arrivals import arrivals
from deploy.bench.record import OK, Record
from deploy.bench.settings import BadLoad, Settings
from deploy.bench.workload import Prepared, Workload
from headwise import AsyncClient, HeadwiseError, Load, ModelInfo, ServerInfo

# A closed loop would otherwise hammer a server that refuses everything at once.
_PAUSE_AFTER_FAILURE_SECONDS = 0.1

OnRecord = Callable[[Record], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """A run, whole or as far as it came; `before` and `after` are the server's own counters."""

    model: ModelInfo
    server: ServerInfo
    records: list[Record]
    seconds: float
    interrupted: bool
    before: Load
    after: Load | None


async def measure(
    client: AsyncClient, settings: Settings, on_end: OnRecord = lambda record: None
) -> Measured:
    """Warm up, then send the load that `settings`, which are `completed`, describe.

    Cancelling the task ends the run, not this call: it returns what there is. Raises
    `headwise.HeadwiseError` if the server cannot be asked, `BadLoad` if it cannot take the load.
    """
    model, server = await client.model_info(), await client.server_info()
    workload = Workload(settings, model)
    await _warm_up(client, workload, settings)
    before = await client.load()
    run = _Run(client, on_end)
    interrupted = False
    try:
        await (run.closed if settings.rate is None else run.open)(workload, settings)
    except asyncio.CancelledError:
        interrupted = True
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
    seconds = run.now()
    after = None
    with contextlib.suppress(HeadwiseError):
        after = await client.load(timeout=5)
    return Measured(model, server, run.records, seconds, interrupted, before, after)


async def _warm_up(client: AsyncClient, workload: Workload, settings: Settings) -> None:
    """Raises `BadLoad` for the first request that fails: so would the measured ones."""
    run = _Run(client, lambda record: None)
    width = settings.concurrency or 1
    await run.workers(width, map(workload.warmup, range(settings.warmup)))
    for record in run.records:
        if record.status != OK:
            raise BadLoad(f"a warm-up request failed with {record.status}: {record.message}")


class _Run:
    """The requests of one run, on one clock."""

    def __init__(self, client: AsyncClient, on_end: OnRecord) -> None:
        self.records: list[Record] = []
        self._client = client
        self._on_end = on_end
        self._began = asyncio.get_running_loop().time()

    def now(self) -> float:
        """Seconds since the start."""
        return asyncio.get_running_loop().time() - self._began

    async def closed(self, workload: Workload, settings: Settings) -> None:
        """`concurrency` requests at a time, each due when the one before it is over."""
        assert settings.concurrency is not None
        numbers: Iterable[int] = islice(count(), settings.requests)
        if settings.duration_s is not None:
            end = settings.duration_s
            numbers = takewhile(lambda _: self.now() < end, numbers)
        await self.workers(settings.concurrency, map(workload.measured, numbers))

    async def workers(self, width: int, requests: Iterable[Prepared]) -> None:
        """Share `requests` out among `width` that send one at a time."""
        shared = iter(requests)

        async def work() -> None:
            for request in shared:
                record = await self._send(request)
                if record.status != OK:
                    await asyncio.sleep(_PAUSE_AFTER_FAILURE_SECONDS)

        async with asyncio.TaskGroup() as group:
            for _ in range(width):
                group.create_task(work())

    async def open(self, workload: Workload, settings: Settings) -> None:
        """Requests are due at the times drawn, however the server keeps up. One that waits for a
        place among `concurrency` is late, and its latencies count from when it was due."""
        assert settings.rate is not None
        due_times: Iterable[float] = islice(
            arrivals(settings.rate, settings.burstiness, workload.arrivals_rng()),
            settings.requests,
        )
        if settings.duration_s is not None:
            end = settings.duration_s
            due_times = takewhile(lambda due: due < end, due_times)
        places = (
            contextlib.nullcontext()
            if settings.concurrency is None
            else asyncio.Semaphore(settings.concurrency)
        )

        async def send(request: Prepared, due: float) -> None:
            async with places:
                await self._send(request, due)

        async with asyncio.TaskGroup() as group:
            for index, due in enumerate(due_times):
                request = workload.measured(index)
                await asyncio.sleep(max(0.0, due - self.now()))
                group.create_task(send(request, due))

    async def _send(self, request: Prepared, due: float | None = None) -> Record:
        """`due` is now unless it is given."""
        now = self.now()
        record = Record(request.index, due=now if due is None else due, sent=now, ended=now)
        self.records.append(record)
        try:
            async with self._client.stream(request.prompt, **request.options) as stream:
                async for delta in stream:
                    record.arrived(self.now(), len(delta.token_ids))
                usage = (await stream.result()).usage
            record.status = OK
            record.prompt_tokens, record.cached_tokens = usage.prompt_tokens, usage.cached_tokens
        except HeadwiseError as error:
            record.status = "CLIENT" if error.code is None else error.code.name
            record.message = str(error)
        finally:
            record.ended = self.now()
        self._on_end(record)
        return record
